# Returns a list nested so deeply that whoever reads it recurses out of its stack.
def total(numbers):
    result = []
    for _ in range(1000000):
        result = [result]
    return result
