package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Guests live in cgroups below the server's own, so that whatever bounds the
// server bounds its guests. In cgroups v2 a group with processes in it cannot
// pass the memory controller on. When the server is alone in its group, as under
// systemd with Delegate=yes, it moves itself into a child; else, as root, it
// uses a group "nbd" at the top.

const cgroupMount = "/sys/fs/cgroup"

const (
	// maxTasks bounds the threads of a QEMU, which has one for each processor and
	// some dozens for its disks.
	maxTasks = 512
	// guestWeight is the part of the processors that a guest gets when many want
	// them, in v2. The server, whose cgroup is beside those of its guests, has 100.
	guestWeight = 20
	// guestShares is the same in v1, where a guest is beside all threads of the
	// server, and perhaps of others, which have as much each.
	guestShares = 1024
)

// A cgroupFactory makes the cgroups of guests.
type cgroupFactory interface {
	// create makes an empty cgroup whose processes may use that much memory. It
	// bounds tasks, and weighs processors, too, if the machine can.
	create(name string, memoryMiB int) (cgroup, error)
	// memoryOnly has create do without the rest.
	memoryOnly()
	// load returns a cgroup that exists.
	load(name string) (cgroup, error)
	// dir is the folder in which the cgroups lie.
	dir() (string, error)
	// close removes what the factory itself made.
	close() error
}

// A cgroup holds the processes of one guest.
type cgroup interface {
	add(pid int) error
	// destroy kills what is left in the group and removes it.
	destroy() error
	// outOfMemory reports whether the kernel killed a process in it for the
	// group's limit.
	outOfMemory() bool
}

// newCgroups returns the factory for this machine, and what it cannot do; or why
// there is none.
func newCgroups() (_ cgroupFactory, weak string, _ error) {
	var f cgroupFactory
	var err error
	switch cgroups.Mode() {
	case cgroups.Unified:
		f, err = newCgroups2()
	case cgroups.Legacy, cgroups.Hybrid:
		f = &cgroups1{}
	default:
		return nil, "", errors.New("no cgroups are mounted on " + cgroupMount)
	}
	if err != nil {
		return nil, "", err
	}
	// Whether it is permitted shows only when it is done.
	if err := tryCgroup(f); err != nil {
		weak = "guests may start threads, and use processors, as the server itself: " + err.Error()
		f.memoryOnly()
		if err := tryCgroup(f); err != nil {
			return nil, "", errors.Join(err, f.close())
		}
	}
	if err := sweepCgroups(f); err != nil {
		return nil, "", errors.Join(err, f.close())
	}
	return f, weak, nil
}

// tryCgroup makes a cgroup and removes it.
func tryCgroup(f cgroupFactory) error {
	g, err := f.create(cgroupName(os.Getpid(), guestCount.Add(1)), 64)
	if err != nil {
		return err
	}
	return g.destroy()
}

// cgroupName names the n-th cgroup of a server by its process id.
func cgroupName(pid int, n int64) string { return fmt.Sprintf("nbd-%d-%d", pid, n) }

// sweepCgroups removes the cgroups of servers that were killed.
func sweepCgroups(f cgroupFactory) error {
	dir, err := f.dir()
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look for old cgroups: %w", err)
	}
	var errs []error
	for _, e := range entries {
		var pid int
		var n int64
		if _, err := fmt.Sscanf(e.Name(), "nbd-%d-%d", &pid, &n); err != nil || e.Name() != cgroupName(pid, n) {
			continue
		}
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			continue
		}
		if g, err := f.load(e.Name()); err != nil {
			errs = append(errs, err)
		} else {
			errs = append(errs, g.destroy())
		}
	}
	return errors.Join(errs...)
}

// cgroups1 makes groups in the hierarchies of cgroups v1.
type cgroups1 struct{ memory bool } // alone

func (c *cgroups1) memoryOnly() { c.memory = true }

func (c *cgroups1) hierarchy() ([]cgroup1.Subsystem, error) {
	all := []cgroup1.Subsystem{cgroup1.NewMemory(cgroupMount)}
	if !c.memory {
		all = append(all, cgroup1.NewPids(cgroupMount), cgroup1.NewCpu(cgroupMount))
	}
	return all, nil
}

func (c *cgroups1) create(name string, memoryMiB int) (cgroup, error) {
	limit, tasks, shares := int64(memoryMiB)<<20, int64(maxTasks), uint64(guestShares)
	g, err := cgroup1.New(cgroup1.NestedPath(name), &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &limit}, Pids: &specs.LinuxPids{Limit: &tasks}, CPU: &specs.LinuxCPU{Shares: &shares},
	}, cgroup1.WithHierarchy(c.hierarchy))
	if err != nil {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	if !slices.ContainsFunc(g.Subsystems(), func(s cgroup1.Subsystem) bool { return s.Name() == cgroup1.Memory }) {
		return nil, errors.Join(errors.New("create cgroup: no memory controller"), g.Delete())
	}
	dir, err := c.dir()
	if err == nil {
		err = neverSwap(filepath.Join(dir, name, "memory.memsw.limit_in_bytes"), limit)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create cgroup: %w", err), g.Delete())
	}
	return &group1{g}, nil
}

func (c *cgroups1) load(name string) (cgroup, error) {
	g, err := cgroup1.Load(cgroup1.NestedPath(name), cgroup1.WithHierarchy(c.hierarchy))
	if err != nil {
		return nil, fmt.Errorf("load cgroup %s: %w", name, err)
	}
	return &group1{g}, nil
}

func (*cgroups1) dir() (string, error) {
	own, err := cgroup1.NestedPath("")(cgroup1.Memory)
	if err != nil {
		return "", fmt.Errorf("find own cgroup: %w", err)
	}
	return filepath.Join(cgroupMount, string(cgroup1.Memory), own), nil
}

func (*cgroups1) close() error { return nil }

type group1 struct{ g cgroup1.Cgroup }

func (g *group1) add(pid int) error {
	if err := g.g.AddProc(uint64(pid)); err != nil {
		return fmt.Errorf("enter cgroup: %w", err)
	}
	return nil
}

func (g *group1) destroy() error {
	return destroyGroup(g.g.Delete, func() error {
		procs, err := g.g.Processes(cgroup1.Memory, true)
		for _, p := range procs {
			err = errors.Join(err, ignoreGone(syscall.Kill(p.Pid, syscall.SIGKILL)))
		}
		return err
	})
}

func (g *group1) outOfMemory() bool {
	m, err := g.g.Stat(cgroup1.IgnoreNotExist)
	return err == nil && m.MemoryOomControl != nil && m.MemoryOomControl.OomKill > 0
}

// cgroups2 makes groups below parent in the unified hierarchy.
type cgroups2 struct {
	mount, parent string
	made          bool // parent was made by us
	memory        bool // alone
}

func (c *cgroups2) memoryOnly() { c.memory = true }

func newCgroups2() (*cgroups2, error) {
	parent, err := delegated()
	if err == nil {
		return &cgroups2{mount: cgroupMount, parent: parent}, nil
	}
	if os.Geteuid() == 0 {
		return &cgroups2{mount: cgroupMount, parent: "/nbd", made: true}, nil
	}
	return nil, err
}

// delegated returns the cgroup in which this process was started, if it is ours
// alone. The process has moved into a child of it then, which it does once.
var delegated = sync.OnceValues(func() (string, error) {
	_, own, err := cgroups.ParseCgroupFileUnified("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("find own cgroup: %w", err)
	}
	if !alone(filepath.Join(cgroupMount, own)) {
		return "", errors.New("the server shares its cgroup " + own + ": run it in a systemd unit with Delegate=yes")
	}
	return own, moveAside(cgroupMount, own)
})

// alone reports whether this process is the only one in the group at path.
func alone(path string) bool {
	procs, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
	return err == nil && strings.TrimSpace(string(procs)) == strconv.Itoa(os.Getpid())
}

// moveAside moves this process into a child of its group, so that the group can
// pass its controllers on.
func moveAside(mount, own string) error {
	m, err := cgroup2.NewManager(mount, filepath.Join(own, "server"), &cgroup2.Resources{})
	if err != nil {
		return fmt.Errorf("create cgroup: %w", err)
	}
	if err := m.AddProc(uint64(os.Getpid())); err != nil {
		return errors.Join(fmt.Errorf("enter cgroup: %w", err), m.Delete())
	}
	return nil
}

func (c *cgroups2) create(name string, memoryMiB int) (cgroup, error) {
	limit, weight := int64(memoryMiB)<<20, uint64(guestWeight)
	want := &cgroup2.Resources{Memory: &cgroup2.Memory{Max: &limit}}
	if !c.memory {
		want.Pids, want.CPU = &cgroup2.Pids{Max: maxTasks}, &cgroup2.CPU{Weight: &weight}
	}
	m, err := cgroup2.NewManager(c.mount, filepath.Join(c.parent, name), want)
	if err != nil {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	if err := neverSwap(filepath.Join(c.mount, c.parent, name, "memory.swap.max"), 0); err != nil {
		return nil, errors.Join(fmt.Errorf("create cgroup: %w", err), m.Delete())
	}
	return &group2{m}, nil
}

func (c *cgroups2) load(name string) (cgroup, error) {
	m, err := cgroup2.Load(filepath.Join(c.parent, name), cgroup2.WithMountpoint(c.mount))
	if err != nil {
		return nil, fmt.Errorf("load cgroup %s: %w", name, err)
	}
	return &group2{m}, nil
}

func (c *cgroups2) dir() (string, error) { return filepath.Join(c.mount, c.parent), nil }

func (c *cgroups2) close() error {
	if !c.made {
		return nil
	}
	err := os.Remove(filepath.Join(c.mount, c.parent))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.ENOTEMPTY) {
		return nil // another server uses it
	}
	return err
}

type group2 struct{ m *cgroup2.Manager }

func (g *group2) add(pid int) error {
	if err := g.m.AddProc(uint64(pid)); err != nil {
		return fmt.Errorf("enter cgroup: %w", err)
	}
	return nil
}

func (g *group2) destroy() error { return destroyGroup(g.m.Delete, g.m.Kill) }

func (g *group2) outOfMemory() bool {
	s, err := g.m.StatFiltered(cgroup2.StatMemoryEvents)
	return err == nil && s.MemoryEvents != nil && s.MemoryEvents.OomKill > 0
}

// neverSwap writes a limit that keeps the memory of a group from being swapped: a
// machine that is busy with that is of use to nobody. Kernels that do not count
// swap have no such file.
func neverSwap(file string, limit int64) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	_, err = fmt.Fprint(f, limit)
	return errors.Join(err, f.Close())
}

// destroyGroup removes a group, killing what is in it. A killed process stays
// in its group for a moment, and nothing tells when it has gone.
func destroyGroup(remove, kill func() error) error {
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
	defer stop()
	err := remove()
	for err != nil {
		killed := kill()
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove cgroup: %w", errors.Join(err, killed))
		case <-time.After(10 * time.Millisecond):
		}
		err = remove()
	}
	return nil
}

// ignoreGone hides that a process has ended already.
func ignoreGone(err error) error {
	if errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}
