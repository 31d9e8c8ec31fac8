# Imports, when it is called, what nothing has loaded before.
def total(numbers):
    import csv
    import sqlite3
    import ssl
    import unittest
    import xml.etree.ElementTree as tree
    import zoneinfo

    assert tree.fromstring("<a/>").tag == "a"
    assert zoneinfo.ZoneInfo("UTC") and ssl and unittest and csv
    return sqlite3.connect(":memory:").execute("select " + "+".join(map(str, [0, *numbers]))).fetchone()[0]
