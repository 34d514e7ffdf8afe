package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// changing are the lines of /proc/self/status that differ from one process to
// the next.
var changing = []string{"Vm", "Rss", "Huge", "nonvol", "vol", "SigQ", "Pid", "Tgid", "NSpid", "NStgid"}

func process() {
	put("pid", "%d", os.Getpid())
	put("parent", "%d", os.Getppid())
	group, err := unix.Getpgid(0)
	put("process group", "%d %s", group, outcome(err))
	session, err := unix.Getsid(0)
	put("session", "%d %s", session, outcome(err))
	others, err := filepath.Glob("/proc/[0-9]*")
	put("processes", "%d %s", len(others), outcome(err))
	for _, name := range []string{"exe", "cwd", "root"} {
		to, err := os.Readlink("/proc/self/" + name)
		put("link "+name, "%s %s", to, outcome(err))
	}
	for _, name := range []string{
		"oom_score_adj", "oom_adj", "personality", "coredump_filter", "timerslack_ns", "cpuset", "cgroup",
		"loginuid", "sessionid", "attr/current", "autogroup", "timens_offsets", "comm", "wchan", "stack", "patch_state",
	} {
		put("self "+name, "%s", text("/proc/self/"+name))
	}
	for _, name := range []string{"cgroup", "ipc", "mnt", "net", "pid", "user", "uts", "time"} {
		to, err := os.Readlink("/proc/self/ns/" + name)
		kind, _, _ := strings.Cut(to, ":")
		put("namespace "+name, "%s %s", kind, outcome(err))
	}
	nice, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	put("nice", "%d %s", 20-nice, outcome(err)) // the raw call returns 20 less it
	policy, _, errno := unix.Syscall(unix.SYS_SCHED_GETSCHEDULER, 0, 0, 0)
	put("scheduler", "%d %s", policy, outcome(errnoOf(0, 0, errno)))
	io, _, errno := unix.Syscall(unix.SYS_IOPRIO_GET, 1, 0, 0)
	put("io priority", "%d %s", io, outcome(errnoOf(0, 0, errno)))
	for _, p := range []struct {
		name string
		n    int
		ptr  bool
	}{
		{"pdeathsig", unix.PR_GET_PDEATHSIG, true}, {"dumpable", unix.PR_GET_DUMPABLE, false},
		{"keepcaps", unix.PR_GET_KEEPCAPS, false}, {"securebits", unix.PR_GET_SECUREBITS, false},
		{"no_new_privs", unix.PR_GET_NO_NEW_PRIVS, false}, {"seccomp", unix.PR_GET_SECCOMP, false},
		{"subreaper", unix.PR_GET_CHILD_SUBREAPER, true}, {"timerslack", unix.PR_GET_TIMERSLACK, false},
		{"thp disable", unix.PR_GET_THP_DISABLE, false}, {"tsc", unix.PR_GET_TSC, true},
		{"mce kill", unix.PR_MCE_KILL_GET, false}, {"io flusher", unix.PR_GET_IO_FLUSHER, false},
	} {
		var v int32
		arg := uintptr(0)
		if p.ptr {
			arg = uintptr(unsafe.Pointer(&v))
		}
		r, _, errno := unix.Syscall6(unix.SYS_PRCTL, uintptr(p.n), arg, 0, 0, 0, 0)
		if !p.ptr {
			v = int32(r)
		}
		put("prctl "+p.name, "%d %s", v, outcome(errnoOf(0, 0, errno)))
	}
	// What is known of the shell that was here first, see testdata/nix/world.nix.
	for line := range strings.SplitSeq(text("/build/status"), "\n") {
		name, value, _ := strings.Cut(line, ":")
		if !slices.ContainsFunc(changing, func(prefix string) bool { return strings.HasPrefix(name, prefix) }) {
			put("status "+name, "%s", strings.Join(strings.Fields(value), " "))
		}
	}
	children()
}

// children looks at what a builder can do with processes of its own.
func children() {
	self := "/proc/self/exe"
	cmd := exec.Command(self, "sleep")
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	err := cmd.Start()
	try("ptrace child", err)
	if err == nil {
		var ws unix.WaitStatus
		_, err = unix.Wait4(cmd.Process.Pid, &ws, 0, nil)
		put("ptrace stop", "%v %s", ws.Stopped(), outcome(err))
		word := make([]byte, 8)
		var regs unix.PtraceRegs
		try("ptrace registers", unix.PtraceGetRegs(cmd.Process.Pid, &regs))
		_, err = unix.PtracePeekData(cmd.Process.Pid, stackPointer(&regs), word)
		try("ptrace peek", err)
		try("ptrace detach", unix.PtraceDetach(cmd.Process.Pid))
		try("kill child", cmd.Process.Kill())
		cmd.Wait()
	}
	// A stranger, which Yama may protect.
	other := exec.Command(self, "sleep")
	if err := other.Start(); err == nil {
		local := make([]byte, 8)
		_, err := unix.ProcessVMReadv(other.Process.Pid, []unix.Iovec{iovec(local)}, []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&other)), Len: 8}}, 0)
		if err == unix.EFAULT {
			err = nil // no such address there, but we may look
		}
		try("read child's memory", err)
		try("child's environ", readable(fmt.Sprintf("/proc/%d/environ", other.Process.Pid)))
		try("lower child's nice", unix.Setpriority(unix.PRIO_PROCESS, other.Process.Pid, -1))
		other.Process.Kill()
		other.Wait()
	}
	// An orphan becomes the builder's, which is the first process.
	orphan := exec.Command(self, "orphan")
	out, err := orphan.Output()
	put("orphan's parent", "%s %s", out, outcome(err))
	try("signal to self", unix.Kill(os.Getpid(), 0))
	try("sysv shared memory", sharedMemory())
	for _, flag := range []struct {
		name string
		flag uintptr
	}{
		{"user", unix.CLONE_NEWUSER}, {"mount", unix.CLONE_NEWNS}, {"pid", unix.CLONE_NEWPID}, {"net", unix.CLONE_NEWNET},
		{"ipc", unix.CLONE_NEWIPC}, {"uts", unix.CLONE_NEWUTS}, {"cgroup", unix.CLONE_NEWCGROUP},
	} {
		try("new namespace "+flag.name, run(flag.flag, "nothing"))
		try("new namespaces user and "+flag.name, run(unix.CLONE_NEWUSER|flag.flag, "nothing"))
	}
	try("mount in new namespaces", run(unix.CLONE_NEWUSER|unix.CLONE_NEWNS, "mount"))
	try("bind in new namespaces", run(unix.CLONE_NEWUSER|unix.CLONE_NEWNS, "bind"))
	try("proc in new namespaces", run(unix.CLONE_NEWUSER|unix.CLONE_NEWNS|unix.CLONE_NEWPID, "proc"))
	try("sysfs in new namespaces", run(unix.CLONE_NEWUSER|unix.CLONE_NEWNS|unix.CLONE_NEWNET, "sysfs"))
	try("overlay in new namespaces", run(unix.CLONE_NEWUSER|unix.CLONE_NEWNS, "overlay"))
	try("chroot in new namespaces", run(unix.CLONE_NEWUSER|unix.CLONE_NEWNS, "chroot"))
}

// run runs a child in new namespaces, as root if one is of users.
func run(flags uintptr, what string) error {
	cmd := exec.Command("/proc/self/exe", what)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	if flags&unix.CLONE_NEWUSER != 0 {
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if len(out) > 0 {
		return fmt.Errorf("%s", out)
	}
	return err
}

// child is what a child of this program does.
func child(what string) {
	var err error
	switch what {
	case "nothing":
	case "sleep":
		time.Sleep(time.Minute)
	case "orphan":
		cmd := exec.Command("/proc/self/exe", "late")
		cmd.Stdout = os.Stdout
		err = cmd.Start()
	case "late":
		for start := time.Now(); os.Getppid() != 1 && time.Since(start) < 10*time.Second; {
			time.Sleep(10 * time.Millisecond)
		}
		fmt.Print(os.Getppid())
	case "mount":
		err = unix.Mount("none", "/tmp", "tmpfs", 0, "")
	case "bind":
		err = unix.Mount("/build", "/tmp", "", unix.MS_BIND, "")
	case "proc":
		err = unix.Mount("none", "/proc", "proc", 0, "")
	case "sysfs":
		err = unix.Mount("none", "/tmp", "sysfs", 0, "")
	case "overlay":
		if err = unix.Mount("none", "/tmp", "tmpfs", 0, ""); err == nil {
			for _, d := range []string{"l", "u", "w", "m"} {
				os.Mkdir("/tmp/"+d, 0o755)
			}
			err = unix.Mount("none", "/tmp/m", "overlay", 0, "lowerdir=/tmp/l,upperdir=/tmp/u,workdir=/tmp/w,userxattr")
		}
	case "chroot":
		err = unix.Chroot("/build")
	}
	if err != nil {
		fmt.Print(outcome(err))
		os.Exit(1)
	}
}

func iovec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: &b[0]}
	v.SetLen(len(b))
	return v
}

// readable reads a byte, if there is one now.
func readable(name string) error {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Read(fd, make([]byte, 1))
	return err
}

func sharedMemory() error {
	id, err := unix.SysvShmGet(unix.IPC_PRIVATE, 4096, unix.IPC_CREAT|0o600)
	if err != nil {
		return err
	}
	b, err := unix.SysvShmAttach(id, 0, 0)
	if err != nil {
		return err
	}
	b[0] = 1
	if err := unix.SysvShmDetach(b); err != nil {
		return err
	}
	_, err = unix.SysvShmCtl(id, unix.IPC_RMID, nil)
	return err
}
