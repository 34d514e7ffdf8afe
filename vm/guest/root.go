package guest

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nbd/vm/link"
)

// Who a builder is, inside its user namespace and outside.
const (
	builderUID = 1000
	builderGID = 100
)

// Files of the sandbox's /etc.
const (
	etcPasswd = "root:x:0:0:Nix build user:/build:/noshell\n" +
		"nixbld:x:1000:100:Nix build user:/build:/noshell\n" +
		"nobody:x:65534:65534:Nobody:/:/noshell\n"
	etcGroup = "root:x:0:\nnixbld:!:100:\nnogroup:x:65534:\n"
	etcHosts = "127.0.0.1 localhost\n::1 localhost\n"
)

// storeDir is where outputs are made; below the sandbox's root.
const storeDir = "/nix/store"

// devices are the device files of the sandbox, but for /dev/kvm. They are bound
// from the agent's /dev.
var devices = []string{"full", "null", "random", "tty", "urandom", "zero"}

// devLinks are the symlinks of the sandbox's /dev.
var devLinks = [][2]string{
	{"/proc/self/fd", "fd"},
	{"/proc/self/fd/0", "stdin"},
	{"/proc/self/fd/1", "stdout"},
	{"/proc/self/fd/2", "stderr"},
	{"/dev/pts/ptmx", "ptmx"},
}

// A bind makes source visible at target, which is absolute in the sandbox.
type bind struct{ Source, Target string }

// A stage is the directory in which a sandbox is put together: root/ becomes
// its root directory and build/ its build directory.
type stage struct {
	dir   string
	made  []string // paths of what every sandbox has
	binds []bind   // what the sandbox's first process has to bind
}

func (s *stage) root() string  { return filepath.Join(s.dir, "root") }
func (s *stage) build() string { return filepath.Join(s.dir, "build") }

// newStage makes what all sandboxes have in the empty directory dir. shell is the
// program that becomes /bin/sh, "" for none. It runs as root, before a template is
// saved.
func newStage(dir, shell string) (*stage, error) {
	s := &stage{dir: dir}
	defer unix.Umask(unix.Umask(0)) // modes are as given here
	for _, step := range []func() error{
		s.makeTree,
		s.makeDevices,
		func() error { return s.makeShell(shell) },
		s.makeBuildDir,
	} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("make sandbox: %w", err)
		}
	}
	return s, nil
}

// furnish adds what the sandbox of one build has. inputs is a directory with the
// store objects. It runs as root, before there is a builder.
func (s *stage) furnish(inputs string, order *link.BuildOrder) error {
	defer unix.Umask(unix.Umask(0))
	for _, step := range []func() error{
		s.touch,
		func() error { return s.makeNetworkFiles(order.Network) },
		func() error { return s.makeKVM(order.KVM) },
		func() error { return s.makeInputs(inputs, order.Inputs) },
		func() error { return s.makeBuildFiles(order.Files) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("make sandbox: %w", err)
		}
	}
	return nil
}

// touch makes everything as young as the build.
func (s *stage) touch() error {
	now := unix.NsecToTimespec(time.Now().UnixNano())
	for _, path := range s.made {
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{now, now}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("set time of %s: %w", path, err)
		}
	}
	return nil
}

// makeTree makes directories and files with the owners and modes that builders
// see in Nix's sandbox.
func (s *stage) makeTree() error {
	for _, d := range []struct {
		path string
		mode os.FileMode
		gid  int
	}{
		{"/", 0o750, builderGID},
		{"/tmp", 0o777 | fs.ModeSticky, 0},
		{"/etc", 0o755, 0},
		{"/dev", 0o755, 0},
		{"/dev/shm", 0o755, 0},
		{"/dev/pts", 0o755, 0},
		{"/proc", 0o555, 0},
		{"/build", 0o700, 0},
		{"/nix", 0o755, 0},
		{storeDir, 0o775 | fs.ModeSticky, builderGID},
	} {
		path := filepath.Join(s.root(), d.path)
		if err := os.Mkdir(path, d.mode); err != nil {
			return err
		}
		if err := os.Chown(path, 0, d.gid); err != nil {
			return err
		}
		s.made = append(s.made, path)
	}
	for name, text := range map[string]string{"passwd": etcPasswd, "group": etcGroup, "hosts": etcHosts} {
		path := filepath.Join(s.root(), "etc", name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
		s.made = append(s.made, path)
	}
	return os.Chmod(filepath.Join(s.root(), "etc"), 0o555)
}

func (s *stage) makeDevices() error {
	for _, name := range devices {
		if err := s.bindFile("/dev/"+name, "/dev/"+name); err != nil {
			return err
		}
	}
	for _, l := range devLinks {
		path := filepath.Join(s.root(), "dev", l[1])
		if err := os.Symlink(l[0], path); err != nil {
			return err
		}
		s.made = append(s.made, path)
	}
	return nil
}

func (s *stage) makeKVM(wanted bool) error {
	if !wanted {
		return nil
	}
	if _, err := os.Stat(kvmDevice); err != nil {
		return fmt.Errorf("the build wants a device that the guest lacks: %w", err)
	}
	return s.bindFile(kvmDevice, kvmDevice)
}

func (s *stage) makeShell(shell string) error {
	if shell == "" {
		return nil
	}
	bin := filepath.Join(s.root(), "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		return err
	}
	s.made = append(s.made, bin)
	return s.bindFile(shell, "/bin/sh")
}

// makeInputs makes a place for each store object. A symlink cannot be bound,
// so it is copied.
func (s *stage) makeInputs(dir string, names []string) error {
	for _, name := range names {
		if err := checkFileName(name); err != nil {
			return err
		}
		source, target := filepath.Join(dir, name), storeDir+"/"+name
		info, err := os.Lstat(source)
		if err != nil {
			return fmt.Errorf("input is not on the disk: %w", err)
		}
		switch {
		case info.IsDir():
			if err := os.Mkdir(filepath.Join(s.root(), target), 0o755); err != nil {
				return err
			}
			s.binds = append(s.binds, bind{source, target})
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(source)
			if err != nil {
				return err
			}
			if err := os.Symlink(to, filepath.Join(s.root(), target)); err != nil {
				return err
			}
		default:
			if err := s.bindFile(source, target); err != nil {
				return err
			}
		}
	}
	return nil
}

// bindFile makes a place for a file that is bound.
func (s *stage) bindFile(source, target string) error {
	path := filepath.Join(s.root(), target)
	if err := unix.Mknod(path, unix.S_IFREG|0o644, 0); err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	s.binds = append(s.binds, bind{source, target})
	return nil
}

// makeBuildDir makes the build directory, which belongs to the builder.
func (s *stage) makeBuildDir() error {
	if err := os.Mkdir(s.build(), 0o700); err != nil {
		return err
	}
	s.made = append(s.made, s.build())
	return os.Chown(s.build(), builderUID, builderGID)
}

// makeBuildFiles makes what Nix puts into the build directory before the builder
// starts.
func (s *stage) makeBuildFiles(files []link.File) error {
	for _, f := range files {
		if err := checkFileName(f.Name); err != nil {
			return err
		}
		path := filepath.Join(s.build(), f.Name)
		if err := os.WriteFile(path, f.Data, 0o644); err != nil {
			return err
		}
		if err := os.Chown(path, builderUID, builderGID); err != nil {
			return err
		}
	}
	return nil
}

// checkFileName wants one component of a path.
func checkFileName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("bad file name %q", name)
	}
	return nil
}

// A diskUse is how much of a disk is in use; all in bytes.
type diskUse struct {
	used, free int64
	// full says, as Nix guesses it, that a builder may have failed for lack of
	// space.
	full bool
}

// useOfDisk looks at the disk that dir lies on.
func useOfDisk(dir string) (u diskUse, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return u, fmt.Errorf("look at scratch disk: %w", err)
	}
	const required = 8 << 20
	u.used, u.free = int64(st.Blocks-st.Bfree)*st.Bsize, int64(st.Bavail)*st.Bsize
	u.full = u.free < required || st.Files > 0 && st.Ffree == 0
	return u, nil
}
