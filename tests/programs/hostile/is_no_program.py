# Is no Python at all.
def total(numbers) -> I would simply add them up:
