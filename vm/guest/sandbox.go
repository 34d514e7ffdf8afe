package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"nbd/vm/guest/builtin"
	"nbd/vm/link"
)

// The descriptors of the sandbox's first process besides the standard ones.
const (
	fdPlan   = 3 // reads a scene, then a plan
	fdStatus = 4 // says statusReady, then what went wrong; closed by the execve of the builder
)

// statusReady says that the first process waits for its plan.
const statusReady = "ready\n"

// A scene is what the first process needs to know to prepare.
type scene struct {
	Root, Build string // directories of the stage
	Binds       []bind
}

// A plan is what the first process needs to know of a build.
type plan struct {
	Binds     []bind // beside those of the scene
	System    string
	Builder   string
	Args, Env [][]byte
	Builtin   *builtin.Order // instead of Builder, Args and Env
}

// sandboxCaps are what the first process keeps through its own execve, which
// would drop everything because uid 0 is not mapped in its namespace.
var sandboxCaps = []uintptr{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_SETGID, unix.CAP_SETUID,
	unix.CAP_SETPCAP, unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN, unix.CAP_SYS_CHROOT, unix.CAP_SYS_RESOURCE,
}

// sandboxCommand returns the command that becomes the builder. in is its
// standard input, out its standard output and error. If cgroupDir is not nil it
// starts in that group.
func sandboxCommand(in, out, planReader, status, cgroupDir *os.File) *exec.Cmd {
	cmd := &exec.Cmd{
		Path:       "/proc/self/exe",
		Args:       []string{link.SandboxArg0},
		Env:        []string{},
		Dir:        "/",
		Stdin:      in,
		Stdout:     out,
		Stderr:     out,
		ExtraFiles: []*os.File{planReader, status},
		SysProcAttr: &syscall.SysProcAttr{
			// A mount namespace follows with the scene.
			Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWPID |
				unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: builderUID, HostID: builderUID, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: builderGID, HostID: builderGID, Size: 1}},
			AmbientCaps: sandboxCaps,
			Setsid:      true, // and no controlling terminal
		},
	}
	if cgroupDir != nil {
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(cgroupDir.Fd())
	}
	return cmd
}

// Sandbox is the first process of a build's namespaces, started by Main with
// argv[0] link.SandboxArg0. It does not return: it becomes the builder, or says
// on a descriptor of its own why it cannot.
func Sandbox() {
	// Credentials, filters and personality are a thread's, and so is the thread
	// that calls execve the one whose are kept.
	runtime.LockOSThread()
	status := os.NewFile(fdStatus, "status")
	fmt.Fprint(status, perform(status))
	os.Exit(1)
}

// perform becomes the builder, or returns why not.
func perform(status io.Writer) error {
	orders := os.NewFile(fdPlan, "plan")
	decoder := json.NewDecoder(orders)
	var s scene
	if err := decoder.Decode(&s); err != nil {
		return fmt.Errorf("read scene: %w", err)
	}
	if err := s.prepare(); err != nil {
		return err
	}
	if _, err := io.WriteString(status, statusReady); err != nil {
		return err
	}
	var p plan
	if err := errors.Join(decoder.Decode(&p), orders.Close()); err != nil {
		return fmt.Errorf("read plan: %w", err)
	}
	if err := p.enter(s.Root); err != nil {
		return err
	}
	return p.become()
}

// prepare does what needs no plan, before a template is saved: so nothing in it
// may depend on randomness or time. The builder inherits no descriptor but the
// standard ones.
func (s *scene) prepare() error {
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close descriptors: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if err := unix.Sethostname([]byte("localhost")); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := unix.Setdomainname([]byte("(none)")); err != nil {
		return fmt.Errorf("set domain name: %w", err)
	}
	// The process is in its group, which is to be the root of what it sees of
	// groups.
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make namespaces: %w", err)
	}
	if err := s.mount(); err != nil {
		return err
	}
	if err := installSeccomp(); err != nil { // nothing that is left to do needs what it forbids
		return fmt.Errorf("filter system calls: %w", err)
	}
	return warmPlan()
}

// warmPlan has encoding and decoding know what a plan is, as link.Warm does for
// messages.
func warmPlan() error {
	b, err := json.Marshal(&plan{Binds: []bind{{}}, Args: [][]byte{{0}}, Env: [][]byte{{0}}, Builtin: &builtin.Order{}})
	if err != nil {
		return err
	}
	return json.Unmarshal(b, new(plan))
}

// enter completes the sandbox and makes it the process's world.
func (p *plan) enter(root string) error {
	// The disk of the inputs has come; nothing else does.
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// There is nobody to share with, but a builder sees that it is so in Nix.
	if err := unix.Mount("", filepath.Join(root, storeDir), "", unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share %s: %w", storeDir, err)
	}
	if err := bindAll(root, p.Binds); err != nil {
		return err
	}
	if err := pivot(root); err != nil {
		return err
	}
	return restartPIDs()
}

// restartPIDs has the builder's first child be process 2: the threads of this
// program have used some numbers. A kernel that cannot do it counts on.
func restartPIDs() error {
	err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("restart process ids: %w", err)
	}
	return nil
}

// mount mounts what all sandboxes have below the root directory to be.
func (s *scene) mount() error {
	// What is mounted here is not seen outside. The disk of the inputs is mounted
	// there later, and must be seen here.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts follow: %w", err)
	}
	// The new root and the store are mounts of their own; nothing can be linked
	// or renamed from one to another.
	binds := []bind{{s.Root, "/"}, {filepath.Join(s.Root, storeDir), storeDir}, {s.Build, "/build"}}
	if err := bindAll(s.Root, append(binds, s.Binds...)); err != nil {
		return err
	}
	for _, m := range []mount{
		{"/proc", "proc", 0, ""},
		{"/dev/shm", "tmpfs", 0, "size=50%"},
		{"/dev/pts", "devpts", 0, "newinstance,mode=0620"},
	} {
		if err := unix.Mount("none", filepath.Join(s.Root, m.target), m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return os.Chmod(filepath.Join(s.Root, "dev/pts/ptmx"), 0o666)
}

// bindAll makes binds below a root directory.
func bindAll(root string, all []bind) error {
	for _, b := range all {
		if err := unix.Mount(b.Source, filepath.Join(root, b.Target), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind %s: %w", b.Target, err)
		}
	}
	return nil
}

// pivot makes dir, a mount, the root directory and forgets the old one.
func pivot(dir string) error {
	if err := os.Chdir(dir); err != nil {
		return err
	}
	// The old root comes to lie on top of the new one, and goes.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach old root: %w", err)
	}
	return os.Chdir("/build")
}

// become gives up all privilege and executes the builder. If that fails the
// builder has failed, with status 1 and Nix's words in the log: then it does
// not return. What it returns is a failure of ours.
func (p *plan) become() error {
	var core syscall.Rlimit
	if err := syscall.Getrlimit(unix.RLIMIT_CORE, &core); err != nil {
		return fmt.Errorf("get core limit: %w", err)
	}
	core.Cur = 0
	if err := syscall.Setrlimit(unix.RLIMIT_CORE, &core); err != nil {
		return fmt.Errorf("set core limit: %w", err)
	}
	unix.Umask(0o022)
	// Of this thread alone: the others end with the execve.
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGID, builderGID, 0, 0); errno != 0 {
		return fmt.Errorf("setgid: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETUID, builderUID, 0, 0); errno != 0 {
		return fmt.Errorf("setuid: %w", errno)
	}
	if err := dropCaps(); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	if err := setPersonality(p.System); err != nil {
		return fmt.Errorf("set personality: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if p.Builtin != nil {
		return becomeBuiltin(p.Builtin)
	}
	err := syscall.Exec(p.Builder, texts(p.Args), texts(p.Env))
	fmt.Fprintf(os.Stderr, "error: executing '%s': %s\n", p.Builder, errnoText(err))
	os.Exit(1)
	return nil
}

// dropCaps empties the capability sets of the calling thread, and with them the
// ambient set.
func dropCaps() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&header, &none[0])
}

// Personalities, linux/personality.h.
const (
	perLinux32      = 0x0008
	addrNoRandomize = 0x0040000
)

// setPersonality makes addresses the same in each run and, for a 32-bit system,
// the machine a 32-bit one.
func setPersonality(system string) error {
	persona := uintptr(addrNoRandomize)
	if system == "i686-linux" || strings.HasPrefix(system, "armv") {
		persona |= perLinux32
	}
	if _, _, errno := unix.Syscall(unix.SYS_PERSONALITY, persona, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// loopbackUp brings up lo; the kernel gives it its addresses.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_LOOPBACK | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

func texts(list [][]byte) []string {
	s := make([]string, len(list))
	for i, b := range list {
		s[i] = string(b)
	}
	return s
}

// errnoText returns the C library's words for an error, as Nix prints them.
func errnoText(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err.Error()
	}
	text := errno.Error()
	return strings.ToUpper(text[:1]) + text[1:]
}
