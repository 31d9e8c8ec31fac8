# Names and texts beyond ASCII: Ελληνικά, 数, 😀.
def total(numbers):
    сумма = 0
    for 数 in numbers:
        сумма += 数
    return сумма if "😀" != "\ud83d" else None
# tests:
def check(candidate):
    assert candidate([1, 2]) == 3
    assert "é".encode() == b"\xc3\xa9"
