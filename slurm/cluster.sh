#!/bin/bash
# A real Slurm cluster (4 virtual nodes x 2 pretend GPUs) and a real Apptainer on this machine, for development and tests.
#
#   slurm/cluster.sh up [--accounting]   install what is missing, start what is not running; the switch
#                                        is followed also while jobs run; exit status 77 where this
#                                        machine can have no cluster
#   slurm/cluster.sh down                end exactly what `up` started (packages stay installed)
#   slurm/cluster.sh status              what runs; exit status 0 only if all of it does
#
# Needs Debian or Ubuntu and root; neither systemd nor real GPUs. Slurm's commands work for every user
# of the machine afterwards.
set -euo pipefail
shopt -s nullglob

STATE=/var/lib/autoresearch-cluster # spool, logs, database, downloads: outlives a reboot
RUN=/run/autoresearch-cluster       # configuration, sockets, pids: gone after a reboot, like the daemons
CONF=$RUN/etc/slurm.conf
LINK=/etc/slurm/slurm.conf # dangles after a reboot: a packaged slurmctld service then does not start
NODES=(n1 n2 n3 n4) SLURMDS=(slurmd-n1 slurmd-n2 slurmd-n3 slurmd-n4)
NODE_NAMES='n[1-4]'
CTLD_PORT=16817 DBD_PORT=16819 DB_PORT=16806

say() { echo "cluster: $*"; }
die() { echo "cluster: $*" >&2; exit 1; }
cannot() { echo "cluster: $*" >&2; exit 77; } # this machine can have no cluster: not the same as a broken one

# ---------------------------------------------------------------- what this machine can do

check_host() {
  [ "$(id -u)" = 0 ] || cannot "needs root: it installs packages, makes device files and starts daemons (sudo $0 ...)"
  command -v apt-get >/dev/null || cannot "knows Debian and Ubuntu only (no apt-get here): run it in a VM, or use a Slurm you have"
  if [ -e $LINK ] && [ "$(readlink $LINK)" != $CONF ]; then
    cannot "this machine has a Slurm of its own ($LINK): nothing was touched; use that one"
  fi
  [ -n "$(ls /sys/fs/cgroup 2>/dev/null)" ] ||
    cannot "nothing is mounted on /sys/fs/cgroup, and slurmd does not start without: a chroot or a minimal container? Use a VM"
  mkdir -p $STATE/{spool,log,cache} $RUN/{etc,pid,dev}
  for gpu in 0 1; do # a gres needs a device file of its own: with Count= alone the nodes come up invalid
    [ -c $RUN/dev/gpu$gpu ] || mknod -m 666 $RUN/dev/gpu$gpu c 1 3 ||
      cannot "mknod was refused: an unprivileged container? Use a VM, or a container with the MKNOD capability"
  done
}

allow_fuse() { # ordinary users mount images by it, as on real clusters
  [ -c /dev/fuse ] || modprobe fuse 2>/dev/null || true
  if [ ! -c /dev/fuse ]; then
    say "no /dev/fuse here: Apptainer will unpack an image at each start, which is slow"
  elif [ "$(stat -c %a /dev/fuse)" != 666 ]; then
    stat -c %a /dev/fuse >$RUN/fuse-mode
    chmod 666 /dev/fuse
    say "/dev/fuse is now readable and writable for all (mode 666); 'down' sets $(<$RUN/fuse-mode) again"
  fi
}

check_namespaces() {
  local key
  for key in kernel.unprivileged_userns_clone=0 kernel.apparmor_restrict_unprivileged_userns=1 user.max_user_namespaces=0; do
    [ "$(sysctl -n "${key%=*}" 2>/dev/null)" != "${key#*=}" ] ||
      say "the kernel keeps ordinary users from user namespaces (${key/=/ = }): as one, Apptainer will not work; see sysctl"
  done
}

# ---------------------------------------------------------------- packages

apt_install() { # without starting services: this script runs its own daemons
  local policy=/usr/sbin/policy-rc.d made=
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && made=1
  fi
  local get=(apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-unsafe-io --no-install-recommends install "$@")
  export DEBIAN_FRONTEND=noninteractive
  "${get[@]}" >$STATE/log/apt.log 2>&1 || { apt-get -qq update && "${get[@]}" >$STATE/log/apt.log 2>&1; } || {
    [ -z "$made" ] || rm -f $policy
    tail -5 $STATE/log/apt.log >&2
    die "installing $* failed (all of it: $STATE/log/apt.log)"
  }
  [ -z "$made" ] || rm -f $policy
}

install_missing() { # command=package ...
  local pair wanted=()
  for pair in "$@"; do
    command -v "${pair%=*}" >/dev/null || wanted+=("${pair#*=}")
  done
  [ ${#wanted[@]} = 0 ] && return
  say "installing ${wanted[*]}"
  apt_install "${wanted[@]}"
}

TOOLS=(slurmctld=slurmctld slurmd=slurmd sbatch=slurm-client munged=munge mksquashfs=squashfs-tools
  squashfuse_ll=squashfuse fuse-overlayfs=fuse-overlayfs newuidmap=uidmap fakeroot=fakeroot
  debootstrap=debootstrap fuse2fs=fuse2fs patchelf=patchelf)

# Debian 12 and 13 have no package of Apptainer; unstable has one for a newer C library. It is fetched
# with apt from the mirror that this machine already uses (so apt checks the index's signature and each
# file's SHA256), and runs beside the system's library with those it was built for.
SID=$STATE/cache/sid
sid_apt() { # a site's mirror may lag behind by more than an index says it is valid for
  local tool=$1 && shift
  "$tool" -qq -o Acquire::Check-Valid-Until=false -o Dir::Etc::sourcelist=$SID/sources.list -o Dir::Etc::sourceparts=- -o Dir::State::lists=$SID/lists \
    -o Dir::Cache=$SID -o Acquire::Languages=none -o APT::Sandbox::User=root "$@"
}

debian_mirror() {
  apt-get indextargets --format '$(ORIGIN) $(LABEL) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
    awk '$1 == "Debian" && $2 == "Debian" && $3 == "main" { print $4; exit }'
}

download_apptainer() {
  local mirror signed=/usr/share/keyrings/debian-archive-keyring.gpg
  mirror=$(debian_mirror)
  [ -n "$mirror" ] || { echo "apt's own sources name no Debian mirror" && return 1; }
  [ -e $signed ] && signed="[signed-by=$signed]" || signed=
  mkdir -p $SID/lists/partial $SID/archives/partial
  echo "deb $signed $mirror sid main" >$SID/sources.list
  sid_apt apt-get update && cd $SID && rm -f ./*.deb &&
    sid_apt apt-get download apptainer libc6 libseccomp2 libsqlite3-0 libgcc-s1 && touch $SID/complete
}

unpack_apptainer() {
  local deb libs=$STATE/apptainer-libs unpacked=$SID/unpacked program
  rm -rf $libs $unpacked && mkdir -p $libs $unpacked
  for deb in $SID/lib*.deb; do
    dpkg-deb --extract "$deb" $unpacked
  done
  find $unpacked -path '*-linux-gnu*/*.so*' -exec cp -P {} $libs/ \; && rm -rf $unpacked
  dpkg-deb --fsys-tarfile $SID/apptainer_*.deb |
    tar -x -C / --wildcards './usr/bin/*' './usr/lib/*' './usr/libexec/*' './etc/apptainer*' './var/lib/apptainer*' 2>/dev/null || true
  for program in /usr/bin/apptainer /usr/lib*/apptainer/bin/starter /usr/lib*/*/apptainer/bin/starter; do
    patchelf --set-interpreter $libs/ld-linux-*.so.* --force-rpath --set-rpath $libs "$program"
  done
  [ -e /usr/bin/singularity ] || ln -s apptainer /usr/bin/singularity # the name that spython calls
}

install_apptainer() { # $1: pid of the download begun beside the other installation, if any
  if command -v apptainer >/dev/null && apptainer --version >/dev/null 2>&1; then return; fi
  if apt-cache show apptainer >/dev/null 2>&1; then
    say "installing apptainer" && apt_install apptainer && return
  fi
  [ -n "$1" ] || die "this release has no package 'apptainer': install it as its project describes, then run this again"
  say "installing apptainer from Debian unstable, with libraries of its own"
  wait "$1" || { cat $STATE/log/apptainer.log >&2 && die "fetching Apptainer failed; Slurm is installed"; }
  unpack_apptainer
  apptainer --version >/dev/null || die "the installed apptainer does not start"
}

install_all() {
  local download=
  [ -n "$(find /var/lib/apt/lists -name '*Packages*' -print -quit)" ] || apt-get -qq update
  if ! command -v apptainer >/dev/null && ! apt-cache show apptainer >/dev/null 2>&1 && grep -qx 'ID=debian' /etc/os-release; then
    [ -e $SID/complete ] || download_apptainer >$STATE/log/apptainer.log 2>&1 &
    download=$!
  fi
  install_missing "${TOOLS[@]}"
  install_apptainer "$download"
}

# ---------------------------------------------------------------- configuration

write_config() { # $1: yes with accounting
  local memory
  memory=$(awk '/MemTotal/ { m = int($2 / 1024 / 5); print (m < 4000 ? m : 4000) }' /proc/meminfo)
  cat >$CONF.new <<END
ClusterName=autoresearch
SlurmctldHost=localhost
SlurmctldPort=$CTLD_PORT
AuthType=auth/munge
AuthInfo=socket=$RUN/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$STATE/spool/ctld
SlurmdSpoolDir=$STATE/spool/%n
SlurmctldPidFile=$RUN/pid/slurmctld
SlurmdPidFile=$RUN/pid/slurmd-%n
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
# Memory is counted, as most sites do: a step that asked for all of it would keep the next one waiting.
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((memory / 4))
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=5
UnkillableStepTimeout=180
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
NodeName=$NODE_NAMES NodeHostname=localhost Port=[17001-17004] CPUs=2 RealMemory=$memory Gres=gpu:2
# Two real cores carry eight pretend GPUs. 'urgent' preempts, 'short' refuses anything over two minutes.
PartitionName=gpu Nodes=$NODE_NAMES Default=YES MaxTime=1-0 DefaultTime=10 OverSubscribe=FORCE:8 PriorityTier=1
PartitionName=urgent Nodes=$NODE_NAMES MaxTime=10 OverSubscribe=FORCE:8 PriorityTier=9 PreemptMode=OFF
PartitionName=short Nodes=$NODE_NAMES MaxTime=2 OverSubscribe=FORCE:8 PriorityTier=1
END
  if [ "$1" = yes ]; then
    cat >>$CONF.new <<END
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$DBD_PORT
AccountingStoragePass=$RUN/munge/socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits,qos
JobAcctGatherType=jobacct_gather/linux
END
  else
    echo 'JobAcctGatherType=jobacct_gather/none' >>$CONF.new
  fi
  echo "NodeName=$NODE_NAMES Name=gpu File=$RUN/dev/gpu[0-1]" >$RUN/etc/gres.conf
  mkdir -p /etc/slurm && ln -sfn $CONF $LINK
}

# ---------------------------------------------------------------- daemons

pid_of() { # a running daemon of ours by its pid file; the name guards against a reused pid
  local pid
  pid=$(cat "$RUN/pid/$1" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${1%%-*}" ] && echo "$pid"
}

stop() { # names: all are told first, then waited for
  local name pid
  for name in "$@"; do pid=$(pid_of "$name") && kill "$pid" || true; done
  for name in "$@"; do
    pid=$(pid_of "$name") || continue
    within 15 gone "$pid" || kill -9 "$pid" || true
    rm -f "$RUN/pid/$name"
  done
}

gone() { [ ! -e "/proc/$1" ] || grep -q '^State:.Z' "/proc/$1/status"; }

within() { # seconds, command ...: until it succeeds
  local deadline=$((SECONDS + $1)) && shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || return 1
    sleep 0.1
  done
}

start_munge() {
  pid_of munged >/dev/null && return
  install -d -o munge -g munge -m 755 $RUN/munge
  install -d -o munge -g munge -m 700 $STATE/munge
  [ -s $STATE/munge/key ] || (umask 077 && head -c 1024 /dev/urandom >$STATE/munge/key && chown munge: $STATE/munge/key)
  rm -f $RUN/munge/socket
  runuser -u munge -- munged --socket=$RUN/munge/socket --key-file=$STATE/munge/key --pid-file=$RUN/munge/pid \
    --log-file=$STATE/munge/log --seed-file=$STATE/munge/seed
  ln -sfn $RUN/munge/pid $RUN/pid/munged
  within 10 test -S $RUN/munge/socket || die "munged did not start: see $STATE/munge/log"
}

start_daemon() { # pid name, command ...: daemons that write their pid file themselves
  local name=$1 && shift
  pid_of "$name" >/dev/null && return
  rm -f "$RUN/pid/$name"
  # a job's limits are inherited from its slurmd: those of a terminal or a CI step are not a node's
  (ulimit -c 0 && ulimit -n "$(ulimit -Hn)" && exec env -i PATH="$PATH" LANG=C.UTF-8 SLURM_CONF=$CONF "$@" </dev/null)
}

await_daemons() {
  local name
  for name in "$@"; do within 20 pid_of "$name" || die "$name did not start: see $STATE/log"; done
}

start_slurm() {
  local node
  start_daemon slurmctld slurmctld &
  for node in "${NODES[@]}"; do
    mkdir -p "$STATE/spool/$node"
    start_daemon "slurmd-$node" slurmd -N "$node" &
  done
  await_daemons slurmctld "${SLURMDS[@]}"
}

nodes_ready() {
  local nodes
  nodes=$(sinfo -h -N -p gpu -o '%T') && [ "$(grep -c -E '^(idle|mixed|allocated)$' <<<"$nodes")" = ${#NODES[@]} ]
}

wait_for_nodes() {
  within 15 nodes_ready && return
  # what once came up wrong, or was failed on purpose by a test, stays out until told otherwise
  scontrol update nodename=$NODE_NAMES state=resume 2>/dev/null || true
  within 30 nodes_ready || { sinfo -N -l >&2 && die "the nodes did not come up: see $STATE/log"; }
}

# ---------------------------------------------------------------- accounting

start_accounting() {
  install_missing slurmdbd=slurmdbd mariadbd=mariadb-server-core mariadb=mariadb-client-core
  local sql=(mariadb --no-defaults --user=root --socket=$RUN/db/socket)
  install -d -o mysql -g mysql -m 755 $RUN/db $STATE/db 2>/dev/null || {
    useradd --system --user-group --no-create-home --shell /usr/sbin/nologin mysql
    install -d -o mysql -g mysql -m 755 $RUN/db $STATE/db
  }
  if [ ! -d $STATE/db/mysql ]; then
    mariadb-install-db --no-defaults --datadir=$STATE/db --user=mysql --skip-test-db >$STATE/log/mariadb-install.log
  fi
  if ! pid_of mariadbd >/dev/null; then
    mariadbd --no-defaults --user=mysql --datadir=$STATE/db --socket=$RUN/db/socket --pid-file=$RUN/db/pid \
      --bind-address=127.0.0.1 --port=$DB_PORT --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
      --innodb-flush-log-at-trx-commit=2 >>$STATE/log/mariadb.log 2>&1 </dev/null &
    disown && ln -sfn $RUN/db/pid $RUN/pid/mariadbd
    within 30 "${sql[@]}" -e 'select 1' || die "mariadbd did not start: see $STATE/log/mariadb.log"
  fi
  if [ ! -s $RUN/etc/slurmdbd.conf ]; then
    local password
    password=$(head -c 18 /dev/urandom | base64 | tr -d '+/=')
    "${sql[@]}" -e "create database if not exists slurm_acct_db; create or replace user slurm@'127.0.0.1' identified by '$password';
      grant all on slurm_acct_db.* to slurm@'127.0.0.1'"
    (umask 077 && cat >$RUN/etc/slurmdbd.conf) <<END
AuthType=auth/munge
AuthInfo=socket=$RUN/munge/socket
DbdHost=localhost
DbdPort=$DBD_PORT
SlurmUser=root
PidFile=$RUN/pid/slurmdbd
LogFile=$STATE/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$DB_PORT
StorageUser=slurm
StoragePass=$password
END
  fi
  start_daemon slurmdbd slurmdbd && await_daemons slurmdbd
  # a slurmctld that starts for the first time and finds nobody listening gives up
  within 20 bash -c "</dev/tcp/127.0.0.1/$DBD_PORT" || die "slurmdbd does not listen: see $STATE/log/slurmdbd.log"
}

add_accounts() { # one account, 'lab'; root and everyone with a home on this machine may use it
  within 30 registered || die "slurmctld did not register with slurmdbd: see $STATE/log"
  local users
  users=$(getent passwd | awk -F: '$3 == 0 || ($3 >= 1000 && $3 < 60000) { print $1 }' | paste -sd,)
  sacctmgr -i add account lab Description=lab Organization=lab >/dev/null || true # 1: nothing new
  sacctmgr -i add user "$users" Account=lab DefaultAccount=lab >/dev/null || true
}

registered() { sacctmgr -nP show cluster format=cluster,controlport | grep -qx "autoresearch|$CTLD_PORT"; }

# ---------------------------------------------------------------- verbs

up() {
  local accounting=no
  case "${1:-}" in
    --accounting) accounting=yes ;;
    '') ;;
    *) die "up takes --accounting or nothing, not '$1'" ;;
  esac
  check_host
  install_all
  allow_fuse
  check_namespaces
  write_config $accounting
  start_munge
  if [ $accounting = yes ]; then
    [ -e $CONF ] || cp $CONF.new $CONF
    start_accounting
  fi
  if ! cmp -s $CONF $CONF.new; then # jobs go on: the daemons find them again
    stop slurmctld "${SLURMDS[@]}"
    mv $CONF.new $CONF
  fi
  rm -f $CONF.new
  start_slurm
  if [ $accounting = yes ]; then
    add_accounts
  else
    stop slurmdbd && stop mariadbd
  fi
  wait_for_nodes
  status
}

down() {
  [ "$(id -u)" = 0 ] || die "needs root"
  if pid_of slurmctld >/dev/null; then
    timeout 20 scancel --state=PENDING,RUNNING,SUSPENDED 2>/dev/null || true
    within 20 no_jobs || true
  fi
  local pid
  stop "${SLURMDS[@]}" && stop slurmctld && stop slurmdbd && stop mariadbd && stop munged
  for pid in /proc/[0-9]*; do # steps whose node was killed by a test
    [ "$(cat "$pid/comm" 2>/dev/null)" != slurmstepd ] || ! grep -qz "^SLURM_CONF=$CONF" "$pid/environ" || kill -9 "${pid#/proc/}"
  done
  [ "$(readlink $LINK)" != $CONF ] || rm -f $LINK
  [ ! -e $RUN/fuse-mode ] || chmod "$(<$RUN/fuse-mode)" /dev/fuse
  rm -rf $RUN
  say "down (installed packages and $STATE stay)"
}

no_jobs() { local jobs; jobs=$(squeue -h) && [ -z "$jobs" ]; }

status() {
  local daemon missing=() all=(munged slurmctld "${SLURMDS[@]}")
  grep -q slurmdbd $CONF 2>/dev/null && all+=(mariadbd slurmdbd)
  for daemon in "${all[@]}"; do
    pid_of "$daemon" >/dev/null || missing+=("$daemon")
  done
  if [ ${#missing[@]} = ${#all[@]} ]; then
    say "down" && return 1
  elif [ ${#missing[@]} != 0 ]; then
    say "not running: ${missing[*]} ('$0 up' starts them)" && return 1
  fi
  nodes_ready || { sinfo -N -l && return 1; }
  say "up: $(sinfo -h -p gpu -o '%D nodes, each %c CPUs and %G'), accounting $(grep -q slurmdbd $CONF && echo on || echo off)," \
    "$(slurmctld -V), $(apptainer --version 2>/dev/null || echo 'no apptainer')"
}

case "${1:-}" in
  up | down | status) "$@" ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
