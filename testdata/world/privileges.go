package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// privileges tries what only a privileged process may do, and what some kernels
// or sandboxes keep from all.
func privileges() {
	try("mount", unix.Mount("none", "/tmp", "tmpfs", 0, ""))
	try("remount", unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, ""))
	try("unmount", unix.Unmount("/build", 0))
	try("chroot", unix.Chroot("/build"))
	try("pivot_root", unix.PivotRoot("/build", "/build"))
	try("set host name", unix.Sethostname([]byte("x")))
	try("set time", unix.Settimeofday(&unix.Timeval{Sec: 1}))
	try("reboot", unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF))
	for _, id := range []uintptr{0, 1, 65534, 1000} {
		try("setuid "+decimal(int64(id)), errnoOf(unix.RawSyscall(unix.SYS_SETUID, id, 0, 0)))
	}
	try("setgid 0", errnoOf(unix.RawSyscall(unix.SYS_SETGID, 0, 0, 0)))
	try("setgid 100", errnoOf(unix.RawSyscall(unix.SYS_SETGID, 100, 0, 0)))
	try("set groups", errnoOf(unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)))
	try("set nice -1", unix.Setpriority(unix.PRIO_PROCESS, 0, -1))
	try("set nice 1", unix.Setpriority(unix.PRIO_PROCESS, 0, 1))
	priority := int32(1)
	try("real-time scheduler", errnoOf(unix.RawSyscall(unix.SYS_SCHED_SETSCHEDULER, 0, 1, uintptr(unsafe.Pointer(&priority)))))
	priority = 0
	try("batch scheduler", errnoOf(unix.RawSyscall(unix.SYS_SCHED_SETSCHEDULER, 0, 3, uintptr(unsafe.Pointer(&priority)))))
	var cpus unix.CPUSet
	try("get CPUs", unix.SchedGetaffinity(0, &cpus))
	put("CPUs", "%d", cpus.Count())
	try("set CPUs", unix.SchedSetaffinity(0, &cpus))
	try("real-time I/O", errnoOf(unix.RawSyscall(unix.SYS_IOPRIO_SET, 1, 0, 1<<13)))
	try("idle I/O", errnoOf(unix.RawSyscall(unix.SYS_IOPRIO_SET, 1, 0, 3<<13)))
	try("load module", unix.InitModule(nil, ""))
	try("kernel log", errnoOf(unix.RawSyscall(unix.SYS_SYSLOG, 3, uintptr(unsafe.Pointer(&cpus)), 1)))
	try("swapoff", errnoOf(unix.RawSyscall(unix.SYS_SWAPOFF, uintptr(unsafe.Pointer(&[]byte("/x\x00")[0])), 0, 0)))
	try("accounting", unix.Acct("/build/acct"))
	try("open by handle", openByHandle())
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{})), Config: unix.PERF_COUNT_SW_TASK_CLOCK}
	_, err := unix.PerfEventOpen(&attr, 0, -1, -1, 0)
	try("perf event", err)
	try("bpf", errnoOf(unix.Syscall(unix.SYS_BPF, 0, uintptr(unsafe.Pointer(&[64]byte{0: 1, 4: 4, 8: 4, 12: 1})), 64)))
	try("userfaultfd", closing(unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)))
	try("io_uring", closing(unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&[256]byte{})), 0)))
	try("fanotify", closing(unix.Syscall(unix.SYS_FANOTIFY_INIT, 0, 0, 0)))
	try("pidfd", closing(unix.Syscall(unix.SYS_PIDFD_OPEN, 1, 0, 0)))
	try("timerfd", closing(unix.Syscall(unix.SYS_TIMERFD_CREATE, 0, 0, 0)))
	try("eventfd", closing(unix.Syscall(unix.SYS_EVENTFD2, 0, 0, 0)))
	try("signalfd", closing(unix.Syscall6(unix.SYS_SIGNALFD4, ^uintptr(0), uintptr(unsafe.Pointer(&[8]byte{})), 8, 0, 0, 0)))
	try("open mount tree", closing(unix.Syscall(unix.SYS_FSOPEN, uintptr(unsafe.Pointer(&[]byte("tmpfs\x00")[0])), 0, 0)))
	_, err = unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
	try("session keyring", err)
	_, err = unix.AddKey("user", "world", []byte("x"), unix.KEY_SPEC_PROCESS_KEYRING)
	try("add key", err)
	try("message queue", closing(unix.Syscall6(unix.SYS_MQ_OPEN, uintptr(unsafe.Pointer(&[]byte("world\x00")[0])), unix.O_CREAT|unix.O_RDWR, 0o600, 0, 0, 0)))
	try("semaphores", errnoOf(unix.Syscall(unix.SYS_SEMGET, 0, 1, 0o1600)))
	try("system V queue", errnoOf(unix.Syscall(unix.SYS_MSGGET, 0, 0o1600, 0)))
	try("personality", errnoOf(unix.Syscall(unix.SYS_PERSONALITY, 0xffffffff, 0, 0)))
	try("kcmp", errnoOf(unix.Syscall6(unix.SYS_KCMP, 1, 1, 0, 1, 2, 0)))
	try("quota", errnoOf(unix.Syscall6(unix.SYS_QUOTACTL, 0x80000100, uintptr(unsafe.Pointer(&[]byte("/dev/x\x00")[0])), 0, 0, 0, 0)))
	try("membarrier", errnoOf(unix.Syscall(unix.SYS_MEMBARRIER, 0, 0, 0)))
	try("close range", errnoOf(unix.Syscall(unix.SYS_CLOSE_RANGE, 1000, 1001, 0)))
	try("openat2", openat2())
}

func openat2() error {
	fd, err := unix.Openat2(unix.AT_FDCWD, "/build", &unix.OpenHow{Flags: unix.O_PATH, Resolve: unix.RESOLVE_BENEATH})
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// closing closes the descriptor that a call has made.
func closing(fd, _ uintptr, errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return unix.Close(int(fd))
}

func openByHandle() error {
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, "/build", 0)
	if err != nil {
		return err
	}
	root, err := unix.Open("/build", unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	_, err = unix.OpenByHandleAt(root, handle, unix.O_RDONLY)
	return err
}
