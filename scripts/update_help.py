"""Store the output of the training parser's ``--help``, which takes seconds to build, beside the command.

Run it after changing an option: ``python scripts/update_help.py``.
"""

from clpl_moe.train import HELP_FILE, help_text

HELP_FILE.write_text(help_text(), encoding="utf-8")
print(f"wrote {HELP_FILE}")
