#!/usr/bin/env bash
# Runs on every worker: mounts the bucket, then trains, and starts again until training is done.
#
#   bash launch/worker.sh BUCKET RUN --config=... [--config.a.b=...]
#
# The workdir is the folder RUN of the bucket. Training goes on in the background, in a process
# group of its own whose number is in ~/fluid_jax.pid, and writes to ~/fluid_jax.log. A worker that
# is training already is left alone: the same command may be given to all of them at any time.
set -euo pipefail

bucket=$1 run=$2
shift 2
mount=~/mnt/$bucket
workdir=$mount/$run
log=~/fluid_jax.log
pid_file=~/fluid_jax.pid
: "${QUICK_CRASH_S:=600}" "${MAX_QUICK_CRASHES:=8}" "${BACKOFF_S:=10}"
cd "$(dirname "$0")/.."

say() { echo "[$(hostname) $(date -u +%FT%TZ)] $*"; }

mount_bucket() {
  mountpoint --quiet "$mount" && return
  fusermount -uz "$mount" 2>/dev/null || true # what a gcsfuse that died left
  mkdir -p "$mount"
  # On TPU machines gcsfuse trusts what it knows of a file for ever unless told not to, and workers
  # must see each other's files. The daemon must not inherit the lock, or it would outlast us.
  gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$bucket" "$mount" 9>&-
}

train() {
  set +m # Python stays in this process group: one signal to the group reaches both, once each
  local stopping='' crashes=0 code started pause
  trap 'stopping=1' TERM INT
  while true; do
    started=$SECONDS code=0
    mount_bucket || code=128 # a crash, as of what follows: tried again after a pause
    if [[ -n $stopping ]]; then exit "$code"; fi
    if ((code == 0)); then
      say 'starting; the first worker prints more once all have started'
      .venv/bin/python -m fluid_jax.main --workdir="$workdir" "$@" || code=$?
    fi
    say "ended with exit code $code"
    # Kept where it outlives this machine; a file in a bucket is there only once it is closed.
    { mkdir -p "$workdir/logs" && cp "$log" "$workdir/logs/$(hostname).log"; } || true
    if [[ -n $stopping ]] || ((code != 42 && code < 128)); then exit "$code"; fi
    if ((code == 42 || SECONDS - started >= QUICK_CRASH_S)); then crashes=0; else ((++crashes)); fi
    if ((crashes == MAX_QUICK_CRASHES)); then say "$crashes quick crashes" && exit "$code"; fi
    pause=$((BACKOFF_S << (crashes < 5 ? crashes : 5)))
    say "starting again in $pause s"
    sleep "$pause" || true # the signal that stops us ends it
    if [[ -n $stopping ]]; then exit "$code"; fi
  done
}

[[ -x .venv/bin/python ]] || { say 'no .venv here: run launch/install.sh first' >&2; exit 2; }
exec 9>>"$pid_file"
if ! flock --nonblock 9; then say "training already; its log is $log" && exit; fi
mount_bucket
set -m
train "$@" </dev/null >>"$log" 2>&1 &
echo $! >"$pid_file"
say "training in process group $!; its log is $log"
