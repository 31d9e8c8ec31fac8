# Waits for coroutines.
import asyncio


async def value(number):
    await asyncio.sleep(0)
    return number


def total(numbers):
    async def all_of_them():
        return sum(await asyncio.gather(*map(value, numbers)))

    return asyncio.run(all_of_them())
