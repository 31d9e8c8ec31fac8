# The same with the one that generators end by.
def total(numbers):
    raise GeneratorExit
