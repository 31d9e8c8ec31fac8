"""A `command` verifier: full marks for the right number, half for one that is off by at most 2."""

import json
import re
import sys

for line in sys.stdin:
    request = json.loads(line)
    numbers = re.findall(r"\d+", request["response"])
    off = abs(int(numbers[0]) - int(request["answer"])) if numbers else None
    score = 0.0 if off is None or off > 2 else 1.0 if off == 0 else 0.5
    print(json.dumps({"id": request["id"], "score": score}), flush=True)
