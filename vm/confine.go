package vm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What keeps a QEMU that its guest has taken over from the rest of the machine;
// THREATS.md tells what each layer is for. Some of it is done by QEMU itself
// (-sandbox: no further processes, no way back to privileges), by its user id
// (users.go) and by its cgroup (cgroup.go). Here is the rest: of files it sees
// what its program consists of and what it inherits, of the network nothing.

// A confinement is what the kernel of this machine lets us do. It is read only.
type confinement struct {
	// landlock is the version of Landlock, 0 if there is none.
	landlock int
	// network says that processes get a network of their own, without devices.
	network bool
	// limits says that we may limit processes of another user.
	limits bool
}

// newConfinement finds out what is possible, by starting the program at path
// with --version as a user (negative: as ours), and what is not.
func newConfinement(path string, uid int) (c *confinement, weak []string) {
	c = &confinement{network: os.Geteuid() == 0, limits: uid < 0 || mayLimit()}
	var err error
	if c.landlock, err = landlockVersion(); err != nil {
		weak = append(weak, "QEMU can read what every user of this machine can: "+err.Error())
	}
	if !c.limits {
		weak = append(weak, "QEMU may have as many files open, and as large ones, as the server: it lacks CAP_SYS_RESOURCE")
	}
	if c.network && c.try(path, uid) != nil {
		c.network = false
	}
	if err := c.try(path, uid); c.landlock > 0 && err != nil {
		// It may be installed where we do not expect it.
		c.landlock = 0
		weak = append(weak, "QEMU can read what every user of this machine can: with Landlock it does not start: "+err.Error())
	}
	switch {
	case !c.network && c.landlock < 4:
		weak = append(weak, "QEMU is in the server's network, and only its own rules keep it from that")
	case !c.network:
		weak = append(weak, "QEMU is in the server's network: Landlock keeps it from TCP, and nothing from UDP")
	}
	return c, weak
}

// try starts QEMU to see whether it can be confined.
func (c *confinement) try(path string, uid int) error {
	var out console
	p, err := startProcess(command{path: path, args: []string{"--version"}, uid: uid, gid: uid, confine: c, output: &out})
	if err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-time.After(patience("", bootPatience)):
		return errors.Join(errors.New("QEMU did not tell its version in time"), p.stop())
	}
	if p.err != nil {
		return fmt.Errorf("QEMU does not start: %s%s", p.exit(), out.summary())
	}
	return nil
}

// programFiles returns what a QEMU consists of: what a distribution has in common
// folders, or, where it is installed elsewhere, what lies beside it, its libraries
// and its data. The folder above those may be somebody's home.
func programFiles(path string) []string {
	all := []string{"/usr", "/lib", "/lib64", "/nix/store", "/gnu/store", "/etc/ld.so.cache", "/etc/ld.so.preload",
		"/proc/filesystems", "/sys/devices/system", "/dev/null", "/dev/urandom"}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if !strings.HasPrefix(path, "/usr/") && !strings.HasPrefix(path, "/nix/store/") {
		dir := filepath.Dir(path)
		prefix := filepath.Dir(dir)
		all = append(all, dir, filepath.Join(prefix, "lib"), filepath.Join(prefix, "lib64"), filepath.Join(prefix, "share/qemu"))
	}
	return all
}

// Rights of Landlock (landlock(7)).
const (
	landlockRead  = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR | unix.LANDLOCK_ACCESS_FS_EXECUTE
	landlockWrite = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE |
		unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	// Of files; the others are of folders.
	landlockFile = landlockWrite | unix.LANDLOCK_ACCESS_FS_EXECUTE
)

// landlockVersion asks the kernel.
func landlockVersion() (int, error) {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch {
	case errno == unix.ENOSYS || errno == unix.EOPNOTSUPP:
		return 0, errors.New("its kernel has no Landlock, or lsm= leaves it out")
	case errno != 0:
		return 0, fmt.Errorf("Landlock: %w", errno)
	}
	return int(v), nil
}

// landlockAll returns what a version can forbid.
func landlockAll(version int) unix.LandlockRulesetAttr {
	a := unix.LandlockRulesetAttr{Handled_access_fs: unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1}
	if version >= 2 {
		a.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if version >= 3 {
		a.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if version >= 4 {
		a.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	}
	if version >= 5 {
		a.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	if version >= 6 {
		a.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
	}
	return a
}

// restrictThread confines the calling thread, for ever, and what it starts.
// The program can read what it consists of, and open again, through
// /proc/self/fd, the files that it inherits. devices can be read and written.
func (c *confinement) restrictThread(program string, files []*os.File, devices []string) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("give up privileges: %w", err)
	}
	if c.landlock == 0 {
		return nil
	}
	rules, err := newLandlock(c.landlock)
	if err != nil {
		return err
	}
	defer unix.Close(rules.fd)
	for _, path := range programFiles(program) {
		if err := rules.allowPath(path, landlockRead); err != nil {
			return err
		}
	}
	for _, path := range append(devices, "/dev/null") {
		if err := rules.allowPath(path, landlockWrite); err != nil {
			return err
		}
	}
	for _, f := range files {
		rights, err := rightsOf(f)
		if err != nil {
			return err
		}
		if err := rules.allow(int(f.Fd()), rights); err != nil && !errors.Is(err, unix.EBADFD) {
			return fmt.Errorf("allow an inherited file: %w", err)
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(rules.fd), 0, 0); errno != 0 {
		return fmt.Errorf("restrict with Landlock: %w", errno)
	}
	return nil
}

// rightsOf returns the rights with which an inherited file can be opened again:
// those with which it is open.
func rightsOf(f *os.File) (uint64, error) {
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return 0, fmt.Errorf("allow an inherited file: %w", err)
	}
	if flags&unix.O_ACCMODE == unix.O_RDONLY {
		return unix.LANDLOCK_ACCESS_FS_READ_FILE, nil
	}
	return landlockWrite, nil
}

// A landlock is a set of rules that is being made.
type landlock struct {
	fd      int
	handled uint64
}

func newLandlock(version int) (*landlock, error) {
	attr := landlockAll(version)
	// Kernels refuse a structure that is longer than theirs, unless what they do
	// not know is zero.
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return nil, fmt.Errorf("make rules of Landlock: %w", errno)
	}
	return &landlock{int(fd), attr.Handled_access_fs}, nil
}

// allowPath allows what is at and below path, if there is something.
func (l *landlock) allowPath(path string, rights uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("allow %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := l.allow(fd, rights); err != nil {
		return fmt.Errorf("allow %s: %w", path, err)
	}
	return nil
}

// allow allows what is at and below an open file. Sockets and files in memory,
// which no path leads to, need no rule and take none (EBADFD).
func (l *landlock) allow(fd int, rights uint64) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		rights &= landlockFile
	}
	rule := unix.LandlockPathBeneathAttr{Allowed_access: rights & l.handled, Parent_fd: int32(fd)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(l.fd), unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// namespaces are the ones that a confined process gets of its own.
func (c *confinement) namespaces() uintptr {
	if c.network {
		return syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS
	}
	return 0
}

// maxDescriptors bounds what QEMU has open. KVM needs two for each queue of each
// disk, and there is a queue for each processor.
const maxDescriptors = 4096

// guestBadness has the kernel kill guests before anything else when the host's
// memory runs out.
const guestBadness = 800

// mayLimit reports whether we may limit processes of other users.
func mayLimit() bool {
	var sets [2]unix.CapUserData
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&head, &sets[0]); err != nil {
		return false
	}
	return sets[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// limit bounds a process that has just been started. Files that it inherits may
// be as long as they are.
func (c *confinement) limit(pid int, files []*os.File) error {
	name := filepath.Join("/proc", strconv.Itoa(pid), "oom_score_adj")
	err := os.WriteFile(name, []byte(strconv.Itoa(guestBadness)), 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil // it has ended, and says why
	}
	if err != nil {
		return fmt.Errorf("limit QEMU: %w", err)
	}
	if !c.limits {
		return nil
	}
	longest := uint64(0)
	for _, f := range files {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return fmt.Errorf("limit QEMU: %w", err)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			longest = max(longest, uint64(st.Size))
		}
	}
	for _, l := range []struct {
		resource int
		value    uint64
	}{
		{unix.RLIMIT_CORE, 0}, {unix.RLIMIT_FSIZE, longest}, {unix.RLIMIT_NOFILE, maxDescriptors},
	} {
		err := unix.Prlimit(pid, l.resource, &unix.Rlimit{Cur: l.value, Max: l.value}, nil)
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("limit QEMU: %w", err)
		}
	}
	return nil
}

// devices returns the devices that a machine's QEMU uses.
func devices(m machine) []string {
	if m.accel == "kvm" {
		return []string{kvmDevice}
	}
	return nil
}
