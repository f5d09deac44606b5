#!/usr/bin/env bash
# Runs on every worker: mounts the bucket, then trains, and restarts training until it is done.
#
#   bash launch/worker.sh BUCKET RUN --config=... [--config.a.b=...]
#
# The workdir is the folder RUN of the bucket. Training runs in the background, in its own process
# group. The number of the group is in ~/fluid_jax.pid, and the log is ~/fluid_jax.log. If training
# is already running, this script changes nothing, so that it can be run on all workers at any time.
set -euo pipefail

bucket=$1 run=$2
shift 2
mount=~/mnt/$bucket
workdir=$mount/$run
log_file=~/fluid_jax.log
pid_file=~/fluid_jax.pid
: "${QUICK_CRASH_S:=600}" "${MAX_QUICK_CRASHES:=8}" "${BACKOFF_S:=10}"
cd "$(dirname "$0")/.."

log() { echo "[$(hostname) $(date -u +%FT%TZ)] $*"; }

mount_bucket() {
  mountpoint --quiet "$mount" && return
  fusermount -uz "$mount" 2>/dev/null || true # after a crash of gcsfuse
  mkdir -p "$mount"
  # Workers must see each other's files, but on TPU machines gcsfuse caches metadata forever by
  # default. The daemon must not inherit the lock, because it outlives this script.
  gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$bucket" "$mount" 9>&-
}

train() {
  set +m # Python stays in this process group, so one signal to the group reaches both
  local stopping='' crashes=0 code started pause
  trap 'stopping=1' TERM INT
  while true; do
    started=$SECONDS code=0
    mount_bucket || code=128 # counts as a crash: try again after a pause
    if [[ -n $stopping ]]; then exit "$code"; fi
    if ((code == 0)); then
      log 'starting; only the first worker prints more, after all workers have started'
      .venv/bin/python -m fluid_jax.main --workdir="$workdir" "$@" || code=$?
    fi
    log "ended with exit code $code"
    # The copy in the bucket outlives this machine. It is complete because it is closed here.
    { mkdir -p "$workdir/logs" && cp "$log_file" "$workdir/logs/$(hostname).log"; } || true
    if [[ -n $stopping ]] || ((code != 42 && code < 128)); then exit "$code"; fi
    if ((code == 42 || SECONDS - started >= QUICK_CRASH_S)); then crashes=0; else ((++crashes)); fi
    if ((crashes == MAX_QUICK_CRASHES)); then
      log "$crashes quick crashes in a row: giving up" && exit "$code"
    fi
    pause=$((BACKOFF_S << (crashes < 5 ? crashes : 5)))
    log "restarting in $pause s"
    sleep "$pause" || true # a signal to stop interrupts it
    if [[ -n $stopping ]]; then exit "$code"; fi
  done
}

[[ -x .venv/bin/python ]] || { log 'no .venv here: run launch/install.sh first' >&2; exit 2; }
exec 9>>"$pid_file"
if ! flock --nonblock 9; then log "already training; the log is $log_file" && exit; fi
mount_bucket
set -m
train "$@" </dev/null >>"$log_file" 2>&1 &
echo $! >"$pid_file"
log "training in process group $!; the log is $log_file"
