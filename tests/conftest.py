"""What holds for all tests."""

import os
import signal

# Started in the background (`make test &`), a shell has SIGINT ignored, and programs that the tests
# interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Who runs the tests may have told git a name, aliases or hooks; a fresh machine has none of that.
os.environ["GIT_CONFIG_GLOBAL"] = os.devnull
