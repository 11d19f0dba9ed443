"""The protocol itself: pure state machines that know no socket, no thread, no torch and no SGLang."""
