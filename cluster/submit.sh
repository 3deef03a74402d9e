#!/usr/bin/env bash
# Submit a job under a name, once, and wait for its end; exit status 0 where it succeeded.
#     RAY_ADDRESS=http://head:8265 cluster/submit.sh nightly-2026-11-20 -- python -m jobs.nightly --config run.yaml
# The name makes a second submission of the same night wait for the first. A failed or stopped job of that name makes room
# for a new attempt: jobs.nightly goes on with the users it has not scored. Flags of `ray job submit` may stand before the --.
set -euo pipefail
name=$1
shift

state() {
    ray job status "$name" 2>/dev/null |
        sed -nE "s/^.*Job '$name' (succeeded|failed|was stopped).*$/\1/p; s/^Status for job '$name': ([A-Z]+).*$/\1/p" |
        head -n 1 || true
}

case "$(state)" in
failed | "was stopped") ray job delete "$name" ;;
esac
if [ -z "$(state)" ]; then
    ray job submit --no-wait --submission-id "$name" "$@"
fi
# Without --no-wait, `ray job submit` may return 0 while the job still runs: ask until it is over.
while true; do
    case "$(state)" in
    succeeded) exit 0 ;;
    failed | "was stopped")
        ray job logs "$name" | tail -n 50
        exit 1
        ;;
    esac
    sleep "${POLL_S:-10}"
done
