package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"nbd/vm/link"
)

// Where the agent keeps things after it left the initramfs.
const (
	newRoot    = "/root" // on the initramfs: the root to be
	cgroupRoot = "/sys/fs/cgroup"
	inputDir   = "/inputs"
	scratchDir = "/scratch"
)

// A mount is one file system that the agent needs for itself.
type mount struct {
	target, fstype string
	flags          uintptr
	data           string
}

// boot brings the guest from the kernel's first call of /init to where it can
// talk to its host. It reports whether the guest is to run guests.
func boot() (runsGuests bool, err error) {
	// The initramfs has no directories but its own.
	for _, m := range []mount{
		{"/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		{"/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	} {
		// devtmpfs may have been mounted by the kernel itself.
		if err := mountAt(m); err != nil && !errors.Is(err, unix.EBUSY) {
			return false, err
		}
	}
	if err := openConsole(); err != nil {
		return false, err
	}
	if err := loadModules(link.ModuleDir); err != nil {
		return false, err
	}
	if runsGuests, err = loadKVM(link.KVMModuleDir); err != nil {
		return false, err
	}
	if err := switchRoot(); err != nil {
		return false, fmt.Errorf("leave initramfs: %w", err)
	}
	for _, m := range []mount{
		{"/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,ptmxmode=0666"},
		{cgroupRoot, "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	} {
		if err := mountAt(m); err != nil {
			return false, err
		}
	}
	for _, dir := range []string{inputDir, scratchDir} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return false, err
		}
	}
	// A sandbox that was made before sees what is mounted here.
	for _, flag := range []uintptr{unix.MS_BIND, unix.MS_SHARED} {
		if err := unix.Mount(inputDir, inputDir, "", flag, ""); err != nil {
			return false, fmt.Errorf("share %s: %w", inputDir, err)
		}
	}
	if err := errors.Join(setLimits(), setSysctls()); err != nil {
		return false, err
	}
	// The agent goes last when memory runs out.
	return runsGuests, os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
}

// setLimits gives builders what services give the Nix daemon. Processes are
// bounded by the build's cgroup alone.
func setLimits() error {
	for _, l := range []struct {
		resource int
		value    uint64
	}{
		{unix.RLIMIT_NOFILE, 1 << 20},
		{unix.RLIMIT_NPROC, unix.RLIM_INFINITY},
	} {
		if err := syscall.Setrlimit(l.resource, &syscall.Rlimit{Cur: l.value, Max: l.value}); err != nil {
			return fmt.Errorf("set limit %d: %w", l.resource, err)
		}
	}
	return nil
}

func mountAt(m mount) error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("none", m.target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s at %s: %w", m.fstype, m.target, err)
	}
	return nil
}

// openConsole makes standard error the console: the kernel could not open it
// for us if the initramfs has no /dev/console.
func openConsole() error {
	fd, err := unix.Open("/dev/console", unix.O_WRONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) {
		return nil // a machine without a console: nobody would read it
	}
	if err != nil {
		return fmt.Errorf("open console: %w", err)
	}
	for _, std := range []int{0, 1, 2} {
		if err := unix.Dup3(fd, std, 0); err != nil {
			return fmt.Errorf("open console: %w", err)
		}
	}
	return nil
}

// loadModules loads the modules in dir, which the host named so that their
// order is the order of loading, and removes them from memory.
func loadModules(dir string) error {
	entries, err := os.ReadDir(dir) // sorted by name
	if errors.Is(err, os.ErrNotExist) {
		return nil // a kernel with everything built in
	}
	if err != nil {
		return fmt.Errorf("load modules: %w", err)
	}
	for _, e := range entries {
		if err := loadModule(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("load module %s: %w", e.Name(), err)
		}
	}
	return os.RemoveAll(dir)
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// switchRoot makes a tmpfs the root directory, with /dev, /proc and /sys moved
// there and the sandbox's shell bound into it. What else the initramfs holds is
// out of sight afterwards; /proc/self/exe still is this program.
func switchRoot() error {
	if err := mountAt(mount{newRoot, "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"}); err != nil {
		return err
	}
	for _, dir := range []string{"/dev", "/proc", "/sys"} {
		if err := os.Mkdir(newRoot+dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(dir, newRoot+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	if _, err := os.Stat(link.ShellPath); err == nil {
		if err := os.WriteFile(newRoot+link.ShellPath, nil, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(link.ShellPath, newRoot+link.ShellPath, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", link.ShellPath, err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return os.Chdir("/")
}
