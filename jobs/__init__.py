"""One thin file a command, for `ray job submit`; the commands themselves are in `cllm4rec.commands`."""
