# Closes every descriptor, so that nobody hears of it again, and runs on.
import os
import time

os.closerange(0, 1024)
time.sleep(1000)
