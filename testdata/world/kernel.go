package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Files of /proc/sys that builders and their tests read.
var sysctls = []string{
	"kernel/hostname", "kernel/domainname", "kernel/ostype", "kernel/osrelease", "kernel/version", "kernel/arch",
	"kernel/pid_max", "kernel/threads-max", "kernel/cap_last_cap", "kernel/core_pattern", "kernel/core_uses_pid",
	"kernel/randomize_va_space", "kernel/overflowuid", "kernel/overflowgid", "kernel/ngroups_max", "kernel/dmesg_restrict",
	"kernel/kptr_restrict", "kernel/perf_event_paranoid", "kernel/yama/ptrace_scope", "kernel/unprivileged_userns_clone",
	"kernel/unprivileged_bpf_disabled", "kernel/io_uring_disabled", "kernel/modules_disabled", "kernel/sched_autogroup_enabled",
	"kernel/shmmax", "kernel/shmall", "kernel/shmmni", "kernel/shm_rmid_forced", "kernel/msgmax", "kernel/msgmnb", "kernel/msgmni",
	"kernel/sem", "kernel/keys/maxkeys", "kernel/pty/max", "kernel/tainted", "kernel/sysrq", "kernel/panic_on_oops", "kernel/print-fatal-signals",
	"vm/overcommit_memory", "vm/overcommit_ratio", "vm/max_map_count", "vm/mmap_min_addr", "vm/mmap_rnd_bits", "vm/swappiness",
	"vm/nr_hugepages", "vm/legacy_va_layout", "vm/unprivileged_userfaultfd", "vm/memfd_noexec",
	"fs/file-max", "fs/nr_open", "fs/pipe-max-size", "fs/pipe-user-pages-soft", "fs/lease-break-time", "fs/leases-enable", "fs/mount-max",
	"fs/protected_hardlinks", "fs/protected_symlinks", "fs/protected_regular", "fs/protected_fifos", "fs/suid_dumpable", "fs/aio-max-nr",
	"fs/inotify/max_user_instances", "fs/inotify/max_user_watches", "fs/inotify/max_queued_events", "fs/epoll/max_user_watches",
	"fs/mqueue/msg_max", "fs/mqueue/msgsize_max", "fs/mqueue/queues_max",
	"user/max_user_namespaces", "user/max_mnt_namespaces", "user/max_pid_namespaces", "user/max_net_namespaces", "user/max_inotify_instances",
	"net/core/somaxconn", "net/core/rmem_max", "net/core/wmem_max", "net/core/default_qdisc",
	"net/ipv4/ip_forward", "net/ipv4/ip_local_port_range", "net/ipv4/ip_unprivileged_port_start", "net/ipv4/ping_group_range",
	"net/ipv4/ip_default_ttl", "net/ipv4/tcp_fin_timeout", "net/ipv4/tcp_syncookies", "net/ipv4/tcp_congestion_control", "net/ipv4/tcp_keepalive_time",
	"net/ipv6/bindv6only", "net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/lo/disable_ipv6", "net/unix/max_dgram_qlen",
	"abi/vsyscall32", "dev/cdrom/info",
}

func kernel() {
	var u unix.Utsname
	try("uname", unix.Uname(&u))
	for _, f := range []struct {
		name string
		text []byte
	}{
		{"sysname", u.Sysname[:]}, {"nodename", u.Nodename[:]}, {"machine", u.Machine[:]},
		{"release", u.Release[:]}, {"version", u.Version[:]}, {"domainname", u.Domainname[:]},
	} {
		put("uname "+f.name, "%s", unix.ByteSliceToString(f.text))
	}
	for _, name := range sysctls {
		put("sysctl "+name, "%s", strings.Join(strings.Fields(text("/proc/sys/"+name)), " "))
	}
	put("random boot_id", "%d", len(text("/proc/sys/kernel/random/boot_id")))
	put("random uuid", "%d %v", len(text("/proc/sys/kernel/random/uuid")), text("/proc/sys/kernel/random/uuid") != text("/proc/sys/kernel/random/uuid"))
	put("random entropy", "%s of %s", text("/proc/sys/kernel/random/entropy_avail"), text("/proc/sys/kernel/random/poolsize"))
	n, err := unix.Getrandom(make([]byte, 256), unix.GRND_RANDOM|unix.GRND_NONBLOCK)
	put("getrandom", "%d %s", n, outcome(err))
	for _, name := range []string{
		"/proc/kmsg", "/proc/kcore", "/proc/kallsyms", "/proc/config.gz", "/proc/modules", "/proc/sysrq-trigger", "/proc/interrupts",
		"/proc/slabinfo", "/proc/timer_list", "/proc/keys", "/proc/mounts", "/proc/partitions", "/proc/diskstats", "/proc/swaps", "/proc/filesystems",
		"/proc/1/mem", "/proc/1/environ", "/proc/1/root/etc/passwd", "/proc/cpuinfo", "/proc/meminfo", "/proc/loadavg", "/proc/uptime", "/proc/stat",
		"/dev/full", "/dev/null", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero", "/dev/ptmx", "/dev/stdin", "/dev/kvm", "/dev/mem", "/dev/fuse", "/dev/console",
	} {
		try("read "+name, readable(name))
	}
	for _, name := range []string{
		"/proc/sys/kernel/hostname", "/proc/sys/kernel/randomize_va_space", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/kernel/core_pattern",
		"/proc/sys/vm/drop_caches", "/proc/sysrq-trigger", "/proc/self/oom_score_adj", "/proc/self/uid_map", "/proc/self/comm", "/proc/self/coredump_filter",
		"/proc/self/attr/current", "/proc/self/mem", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/stdout", "/dev/stderr", "/dev/fd/1", "/dev/fd/2",
	} {
		f, err := os.OpenFile(name, os.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
		try("open for writing "+name, err)
		if err == nil {
			f.Close()
		}
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err == nil {
		_, err = full.Write([]byte{0})
	}
	try("write to /dev/full", err)
	try("raise oom_score_adj", os.WriteFile("/proc/self/oom_score_adj", []byte("500"), 0))
	try("lower oom_score_adj", os.WriteFile("/proc/self/oom_score_adj", []byte("-500"), 0))
	var info unix.Sysinfo_t
	try("sysinfo", unix.Sysinfo(&info))
}

func clock() {
	now := time.Now()
	zone, offset := now.Zone()
	put("clock zone", "%s %d", zone, offset)
	put("clock century", "%d", now.Year()/100)
	for _, c := range []struct {
		name string
		id   int32
	}{{"realtime", unix.CLOCK_REALTIME}, {"monotonic", unix.CLOCK_MONOTONIC}, {"boottime", unix.CLOCK_BOOTTIME}, {"cpu", unix.CLOCK_PROCESS_CPUTIME_ID}} {
		var ts unix.Timespec
		err := unix.ClockGetres(c.id, &ts)
		put("clock resolution "+c.name, "%d %s", ts.Nano(), outcome(err))
	}
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	put("clock adjusted", "TAI-UTC %d %s", tx.Tai, outcome(err))
	put("clock state", "%d status %#x", state, tx.Status)
	// A file's times neither go back nor lie ahead of the clock.
	last, backwards, ahead := int64(0), 0, 0
	for i := range 50 {
		name := fmt.Sprintf("/build/time-%d", i)
		os.WriteFile(name, []byte{1}, 0o644)
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			try("file time", err)
			return
		}
		after := time.Now().UnixNano()
		for _, t := range []int64{st.Mtim.Nano(), st.Ctim.Nano()} {
			if t < last {
				backwards++
			}
			if t > after {
				ahead++
			}
		}
		last = st.Ctim.Nano()
		os.Remove(name)
	}
	put("file times", "%d back, %d ahead", backwards, ahead)
	put("file clock", "%v", time.Duration(time.Now().UnixNano()-last) < time.Minute)
}
