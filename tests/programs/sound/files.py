# Keeps its numbers in files, by name, by tempfile and under folders.
import os
import shutil
import tempfile


def total(numbers):
    with open("numbers.txt", "w") as out:
        out.write("\n".join(map(str, numbers)))
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile("w+") as file:
        os.makedirs(os.path.join(folder, "a", "b"))
        shutil.copyfile("numbers.txt", os.path.join(folder, "a", "b", "copy"))
        file.write(open(os.path.join(folder, "a", "b", "copy")).read())
        file.seek(0)
        return sum(int(line) for line in file)
