"""The protocol, pure logic: no clock, sockets, threads, torch or SGLang; `now` is an argument."""
