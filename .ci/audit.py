"""Asks for known vulnerabilities of what is installed, and says of how many packages there was an answer.

pip-audit ends with "No known vulnerabilities found" also where its service knows none of the packages, as behind a
mirror of PyPI without vulnerability data, or without network. That is no finding, and no proof either: it is said, and
does not fail CI. A known vulnerability does.
"""

import json
import subprocess
import sys

SECONDS = 300
# vulnerabilities that are known and do not concern this project: id and why
ACCEPTED: dict[str, str] = {}


def main() -> int:
    """1 if a package has a known vulnerability that is not accepted."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--format=json", "--progress-spinner=off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        print(f"pip-audit: NOT AUDITED, no answer in {SECONDS} s.")
        return 0
    except ValueError:
        if "No module named pip_audit" in done.stderr:
            print("pip-audit is not installed: pip install -e '.[dev]'")
            return 1
        print(f"pip-audit: NOT AUDITED, the service was not reached: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return 0
    known = [package for package in packages if "skip_reason" not in package]
    missing = "" if len(known) == len(packages) else " The others: no answer, so nothing is known of them."
    state = "" if known else "NOT AUDITED, "
    print(f"pip-audit: {state}answers for {len(known)} of {len(packages)} packages.{missing}")
    faults = [(p["name"], p["version"], v["id"]) for p in known for v in p["vulns"] if v["id"] not in ACCEPTED]
    for name, version, vulnerability in faults:
        print(f"{name} {version}: {vulnerability}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
