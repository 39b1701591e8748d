"""`python -m tests.golden` writes the golden bytes anew, after a deliberate change of what travels or is kept on disk."""

import json

from tests.golden.encodings import STRUCTS, encoded_structs, encodings
from tests.golden.golden import FILE

if __name__ == "__main__":
    FILE.write_text(json.dumps({"structs": encoded_structs(STRUCTS), "encodings": encodings()}, indent=1, sort_keys=True) + "\n")
