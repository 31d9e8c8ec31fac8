# Returns a list that holds itself.
def total(numbers):
    result = []
    result.append(result)
    return result
