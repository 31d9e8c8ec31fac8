# Sleeps for ever, while it loads, and takes no processor time for it.
import time

time.sleep(1000)
