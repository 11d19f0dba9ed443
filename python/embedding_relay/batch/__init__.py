"""Batch sessions: a workbook of prompts in, the same workbook with the answers out. Needs neither SGLang nor torch.

`command_line` is the way in; it starts `http/serve` (the service) or `terminal` (one workbook, no server). Both use
`service` (what a caller may do to a session), `preview` (what is shown before a run) and `background/` (what workers do
beside calls). These meet in `session/`: records in the `store/`, large data in a folder. `workbook/` reads and writes
the files, `asking/` asks the endpoint.
"""
