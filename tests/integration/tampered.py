"""Changes one byte of each file, and calls every command that must then refuse version 1.

The command that signs comes last and only for the first file, because new signatures would hide a change of the old ones.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from tools.cli import main
from tools.servers import serve

# A server that is not refused must not run until the test's time is over.
serve.run_server = lambda *_: print("The server would start.", file=sys.stderr)


def call(*arguments: str) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    return code, stderr.getvalue()


recipe, ports, *files = sys.argv[1:]
commands = {
    "serve": ["serve", "--version", "1", "--port", ports],
    "promote": ["models", "promote", "1"],
    "export": ["models", "export", "--version", "1"],
    "push": ["models", "push", "--version", "1", "--repo", "someone/tiny", "--set", "hub.license=mit",
             "--set", "hub.base_license=mit"],
}  # fmt: skip
found = {}
for file in map(Path, files):
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    try:
        found[str(file)] = {name: call(*command, "--config", recipe) for name, command in commands.items()}
        if file == Path(files[0]):
            found[str(file)]["sign"] = call("models", "sign", "1", "--config", recipe)
    finally:
        file.write_bytes(content)
print(json.dumps(found))
