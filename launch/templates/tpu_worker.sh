
# On each worker of the TPU: setup, run or report. Status 11 and 12 are the task's 1 and 2, since gcloud has its own 1 and 2.
set -euo pipefail
export PATH="$HOME/.local/bin:$PATH"
python=$HOME/vitmed-env/bin/python
place=$HOME/vitmed-checkout

set_up() {
    if ! mountpoint --quiet "$MOUNT"; then
        sudo apt-get -qq update
        sudo apt-get -qq install --yes nfs-common
        sudo mkdir -p "$MOUNT"
        sudo mount -t nfs "$SHARE" "$MOUNT"
    fi
    if ! mkdir -p "$WORKDIR/launch/tpu"; then
        echo "vitmed: $(id -un) cannot write to $MOUNT; make the export $SHARE writable for all" >&2
        exit 12
    fi
    rm -rf "$place"
    mkdir "$place"
    tar --extract --gzip --file="$HOME/vitmed.tgz" --directory="$place"
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    [ -x "$python" ] || uv venv --quiet --python 3.11 "$HOME/vitmed-env"
    cd "$place"
    uv pip install --quiet --python "$python" --constraint requirements.lock '.[tpu,medical,hub]'
}

run() {
    # gcloud gives a command again whose connection broke: the second waits until the first has ended, and finds its points done.
    exec 9>"$HOME/vitmed.lock"
    flock 9
    exec >>"$WORKDIR/launch/tpu/$(hostname).log" 2>&1 # a broken connection must not end what runs
    cd "$place"
    local worst=0 status task
    for task in $TASKS; do
        status=0
        run_task "$task" || status=$?
        case $status in
            0) ;;
            1) worst=11 ;;
            2) exit 12 ;;
            *) exit "$status" ;;
        esac
    done
    exit "$worst"
}

case $1 in
    setup) set_up ;;
    run) run ;;
    report)
        cd "$place"
        report
        ;;
esac
