#!/usr/bin/env bash
# Submit a job under a name, once, wait for its end, and end with its exit status and the last lines of its log.
#     RAY_ADDRESS=http://head:8265 cluster/submit.sh nightly-2026-11-20 -- python -m jobs.nightly --config run.yaml
# The name makes a second submission of the same night wait for the first. A failed or stopped job of that name makes room
# for a new attempt: jobs.nightly goes on with the users it has not scored. Flags of `ray job submit` may stand before the --.
# Where this script is ended (SIGTERM: a deadline, a drained node), so is the job.
set -euo pipefail
name=$1
shift

state() {
    ray job status "$name" 2>/dev/null |
        sed -nE "s/^.*Job '$name' (succeeded|failed|was stopped).*$/\1/p; s/^Status for job '$name': ([A-Z]+).*$/\1/p" |
        head -n 1 || true
}

exit_status() {
    ray job status "$name" 2>/dev/null |
        sed -nE "s/^Status message: .*failed with exit code ([0-9]+).*$/\1/p" | head -n 1 || true
}

stop() {
    trap - TERM INT
    echo "ended from outside: stopping the job $name" >&2
    ray job stop --no-wait "$name" >&2 || true
    exit 143
}
trap stop TERM INT

case "$(state)" in
failed | "was stopped") ray job delete "$name" ;;
esac
if [ -z "$(state)" ]; then
    ray job submit --no-wait --submission-id "$name" "$@"
fi
# Without --no-wait, `ray job submit` may return 0 while the job still runs: ask until it is over.
while true; do
    ended=$(state)
    case "$ended" in
    succeeded | failed | "was stopped")
        ray job logs "$name" | tail -n 50 || true
        [ "$ended" = succeeded ] && exit 0
        status=$(exit_status)
        exit "${status:-1}"
        ;;
    esac
    sleep "${POLL_S:-10}" &
    wait $! # bash runs a trap only between commands; `wait` is one that it interrupts
done
