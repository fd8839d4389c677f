#!/usr/bin/env bash
# Creates a Cloud TPU VM or a slice of several, runs one command on every host, and deletes it.
#   NAME=csba ZONE=us-west4-a TPU=v5litepod-16 BUCKET=my-bucket launch/tpu_vm.sh \
#     csba-train --config=configs/cifar10_lt.py
# Needs: gcloud, logged in, with the TPU API and quota for $TPU in $ZONE (v2 to v6e); a bucket (best
# with a hierarchical namespace) that the VMs' service account may write. Every host mounts the
# bucket at /mnt/csba. Put data under gs://$BUCKET/tfds, or photos into a folder of the bucket and
# set --config.data.dir=/mnt/csba/FOLDER. The script adds --workdir=/mnt/csba/$NAME to the command,
# and copies that folder to runs/$NAME at the end. It runs the last commit, without uncommitted
# changes. csba-study needs a single host (v5litepod-8 at most); other commands run on any slice.
# Options: SPOT=1 (cheaper; a preempted VM is created again), TRIES=10 (starts at most, also those
# without capacity; an error of the first start ends the script), PAUSE=60 (seconds between checks),
# KEEP=1 (keeps the VM for the next start), VERSION (of the VM's image).
# Costs: the TPU, every second from creation to deletion, also while it installs or waits; the
# bucket, until you empty it. The script deletes the VM whenever it exits; if the machine that runs
# the script fails, the VM stays. To delete everything:
#   gcloud compute tpus tpu-vm delete $NAME --zone=$ZONE --quiet
#   gcloud storage rm --recursive gs://$BUCKET/$NAME
# shellcheck disable=SC2329 # functions that traps call
set -euo pipefail
fail() { echo "tpu_vm.sh: $1" >&2; exit 1; }
say() { echo "tpu_vm.sh: $1" >&2; }
need() { [ -n "${!1:-}" ] || fail "expected \$$1, got none: set it to $2"; }
need NAME 'a name for the VM and the run, e.g. csba'
need ZONE 'a zone that has this TPU, e.g. us-west4-a'
need TPU 'a type of accelerator, e.g. v5litepod-8'
need BUCKET 'a Cloud Storage bucket for results, e.g. my-bucket'
[ $# -gt 0 ] || fail 'expected a command, got none: add e.g. csba-train --config=configs/digits_lt.py'
command -v gcloud >/dev/null || fail 'expected gcloud, got none: install the Google Cloud CLI'
case $TPU in
  v6e-*) image=v2-alpha-tpuv6e ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  *) image=tpu-ubuntu2204-base ;;
esac
[[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "expected small letters, digits and -, got $NAME"
mount=${MOUNT:-/mnt/csba} program=$1
shift
case $program in # hosts find each other in the VM's metadata, which only `on` reads
  csba-train | csba-evaluate | csba-diagnose) set -- --distributed=on --start_timeout=900 "$@" ;;
esac
printf -v command '%q ' "$program" "$@" "--workdir=$mount/$NAME"
tries=${TRIES:-10} pause=${PAUSE:-60} spot=()
if [ "${SPOT:-}" = 1 ]; then spot=(--spot); fi

tpu() { gcloud compute tpus tpu-vm "$1" "$NAME" "--zone=$ZONE" "${@:2}"; }
state() { # READY, PREEMPTED, ...; empty if there is no such VM
  gcloud compute tpus tpu-vm list "--zone=$ZONE" "--filter=name~(^|/)$NAME\$" '--format=value(state)'
}
on_all() { # runs a command on every host; its exit code is the first that is not 0
  tpu ssh --worker=all --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=20 \
    "--command=$1"
}
rest() { # in the background, so that a signal is handled at once
  sleep "$pause" &
  resting=$!
  wait $resting
  resting=
}
make_ready() { # creates, starts or waits for the VM; fails if there is no capacity
  for ((look = 0; look < 30; look++)); do
    found=$(state) || exit 1
    case $found in
      READY) return ;;
      '')
        say "creating $NAME ($TPU), billed from now on"
        tpu create "--accelerator-type=$TPU" "--version=${VERSION:-$image}" "${spot[@]}" --quiet
        return
        ;;
      PREEMPTED | TERMINATED) tpu delete --quiet || return ;; # it cannot be restarted
      STOPPED) tpu start || return ;;
      *) # CREATING, STARTING, RESTARTING, ...: wait for the next state
        say "$NAME is $found"
        rest
        ;;
    esac
  done
  return 1
}
delete() {
  if [ "${KEEP:-}" = 1 ]; then
    say "$NAME is kept, and billed until you delete it: see the top of this file"
  elif found=$(state) && [ -z "$found" ]; then
    return
  elif ! tpu delete --quiet; then
    say "$NAME COULD NOT BE DELETED, and is billed: see the top of this file"
    return 1
  fi
}
collect() {
  mkdir -p "runs/$NAME" && gcloud storage rsync --recursive "gs://$BUCKET/$NAME" "runs/$NAME"
}
finish() {
  code=$?
  trap '' INT TERM HUP
  [ -z "${resting:-}" ] || kill "$resting" || true
  rm -rf "$files"
  delete || code=$((code ? code : 1))
  if [ -n "${ended:-}" ]; then collect || code=$((code ? code : 1)); fi
  exit "$code"
}
stop() {
  trap '' INT TERM HUP
  say 'stopping: the run saves its state, start again to continue'
  on_all "$stop_program" || true
  exit "$1"
}
stop_program="pkill -TERM -x $program || true
for _ in {1..120}; do pgrep -x $program >/dev/null || break; sleep 1; done"

found=$(state)
if [ -n "$found" ] && [ "${KEEP:-}" != 1 ]; then
  fail "expected no TPU VM named $NAME, got one: delete it, name another, or use it with KEEP=1"
fi
files=$(mktemp -d)
git -C "$(dirname "$0")" bundle create -q "$files/csba_jax.bundle" HEAD
# What every host runs. After a broken connection the program may still run: it stops it first.
cat >"$files/csba.sh" <<END
set -eo pipefail
$stop_program
if ! mountpoint -q $mount; then
  if ! command -v gcsfuse >/dev/null; then
    package=gcsfuse_2.7.0_amd64.deb
    curl -fsSLO https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v2.7.0/\$package
    sudo apt-get install -y -qq ./\$package
  fi
  sudo mkdir -p $mount
  sudo chown "\$(id -u)" $mount
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 $BUCKET $mount
fi
rm -rf csba_jax
git -c advice.detachedHead=false clone -q csba_jax.bundle csba_jax
cd csba_jax
python3 -m pip install --quiet --user uv==0.8.8
uv=\$(python3 -m site --user-base)/bin/uv
export VIRTUAL_ENV=\$HOME/venv PATH=\$HOME/venv/bin:\$PATH TFDS_DATA_DIR=$mount/tfds
"\$uv" venv --quiet --allow-existing --python 3.12 "\$VIRTUAL_ENV" # the image has an older one
"\$uv" pip install --quiet -r requirements.txt -e '.[tpu]'
$command 2>&1 | sed -u "s/^/\$(hostname): /"
END

trap finish EXIT
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP
known=$found # not empty once a VM of this name has existed
for ((try = 1; try <= tries; try++)); do
  say "start $try of $tries"
  code=0
  make_ready || code=$?
  if [ "$code" != 0 ]; then
    [ -n "$known" ] || exit "$code" # a wrong zone or no quota would fail again
    say "no VM available, exit $code"
    ((try == tries)) || rest
    continue
  fi
  known=1
  {
    gcloud compute tpus tpu-vm scp "$files/csba.sh" "$files/csba_jax.bundle" "$NAME:" \
      "--zone=$ZONE" --worker=all && on_all 'bash csba.sh'
  } &
  code=0
  wait $! || code=$?
  case $code in
    0) break ;;
    75 | 134 | 255) ;; # asked to stop, a process was lost, the connection was lost
    *) if [ "$(state)" = READY ]; then break; fi ;;
  esac
  say "exit $code"
done
ended=1
exit "$code"
