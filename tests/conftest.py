"""What holds for all tests."""

import signal

# Started in the background (`make test &`), a shell has SIGINT ignored, and programs that the tests
# interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
