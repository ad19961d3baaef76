
# Gets the TPU, runs the tasks on all of its workers at once, gets another one whenever it is taken away, makes the report, and gives the
# TPU back however this script ends.
set -euo pipefail
cd "$(dirname "$0")"
MOST_UNANSWERED=20 # half a minute each

say() { echo "vitmed: $*" >&2; }
requests() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" --quiet "${@:2}"; }
on_workers() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --quiet --worker="$1" --command="bash worker.sh $2"; }

give_back() {
    trap '' TERM INT HUP # another signal must not end the deletion: the TPU would stay and cost
    say "giving the TPU $NAME back"
    requests delete --force || say "look whether it is still there: gcloud compute tpus queued-resources list --zone=$ZONE"
}
trap give_back EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# The state of the request, ABSENT only where gcloud says so: what fails otherwise, such as a login that has run out, says nothing of it.
ask_state() {
    state=$(requests describe --format='value(state.state)' 2>answer.txt) && return
    if grep --quiet NOT_FOUND answer.txt; then state=ABSENT; else state=UNKNOWN; fi
}

attempt=0
get_machine() {
    local state unanswered=0
    while :; do
        ask_state
        [ "$state" = UNKNOWN ] || unanswered=0
        case $state in
            ACTIVE) return ;;
            UNKNOWN)
                unanswered=$((unanswered + 1))
                say "cannot ask for the state of $NAME, $unanswered of $MOST_UNANSWERED times: $(grep -m 1 ERROR answer.txt || tail -n 1 answer.txt)"
                if [ "$unanswered" -ge "$MOST_UNANSWERED" ]; then
                    say "gave up; the same command again goes on"
                    exit 75
                fi
                ;;
            ABSENT)
                attempt=$((attempt + 1))
                if [ "$attempt" -gt "$ATTEMPTS" ]; then
                    say "gave up after $ATTEMPTS attempts; the same command again goes on"
                    exit 75
                fi
                say "attempt $attempt of $ATTEMPTS: asking for a $TYPE in $ZONE"
                requests create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+"$SPOT"} --async
                ;;
            FAILED | SUSPENDING | SUSPENDED) # refused, or taken away
                say "the TPU is $state"
                requests delete --force
                continue
                ;;
        esac
        sleep 30
    done
}

set_up() {
    tar --create --gzip --exclude=__pycache__ --file=vitmed.tgz --directory="$CHECKOUT" \
        vitmed configs launch pyproject.toml requirements.lock README.md LICENSE &&
        gcloud compute tpus tpu-vm scp vitmed.tgz worker.sh "$MANIFEST" "$NAME:" --zone="$ZONE" --quiet --worker=all &&
        on_workers all setup
}

while :; do
    get_machine
    status=0
    { set_up && on_workers all run; } || status=$?
    case $status in
        0 | 11) break ;; # see worker.sh
        12)
            say "wrong input; what was said stands above and in the logs below $WORKDIR/launch/tpu"
            exit 2
            ;;
        75) say "stopped by a signal: once more" ;;
        *) say "exit status $status: the TPU was lost, or could not be reached" ;;
    esac
    # A machine that is taken away may seem active for a while; a new one costs minutes, and points go on from their checkpoints.
    requests delete --force || sleep 60
done
on_workers 0 report || status=1
[ "$status" = 0 ] || say "points have failed, or the report leaves runs out: see the logs below $WORKDIR/launch/tpu"
[ "$status" = 0 ]
