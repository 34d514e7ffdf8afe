package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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

// A cgroupFactory makes the cgroups of guests.
type cgroupFactory interface {
	// create makes an empty cgroup whose processes may use that much memory.
	create(name string, memoryMiB int) (cgroup, error)
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

// newCgroups returns the factory for this machine, and why there is none
// otherwise.
func newCgroups() (cgroupFactory, error) {
	var f cgroupFactory
	var err error
	switch cgroups.Mode() {
	case cgroups.Unified:
		f, err = newCgroups2(cgroupMount)
	case cgroups.Legacy, cgroups.Hybrid:
		f = cgroups1{}
	default:
		return nil, errors.New("no cgroups are mounted on " + cgroupMount)
	}
	if err != nil {
		return nil, err
	}
	// Whether it is permitted shows only when it is done.
	g, err := f.create(fmt.Sprintf("nbd-probe-%d", os.Getpid()), 64)
	if err != nil {
		return nil, errors.Join(err, f.close())
	}
	if err := g.destroy(); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

// cgroups1 makes groups in the memory hierarchy of cgroups v1.
type cgroups1 struct{}

func (cgroups1) create(name string, memoryMiB int) (cgroup, error) {
	limit := int64(memoryMiB) << 20
	memory := func() ([]cgroup1.Subsystem, error) {
		return []cgroup1.Subsystem{cgroup1.NewMemory(cgroupMount)}, nil
	}
	g, err := cgroup1.New(cgroup1.NestedPath(name),
		&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}},
		cgroup1.WithHierarchy(memory))
	if err != nil {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	if len(g.Subsystems()) == 0 {
		return nil, errors.New("create cgroup: no memory controller")
	}
	return &group1{g}, nil
}

func (cgroups1) close() error { return nil }

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
}

func newCgroups2(mount string) (*cgroups2, error) {
	_, own, err := cgroup1Paths()
	if err != nil {
		return nil, err
	}
	if alone(filepath.Join(mount, own)) {
		if err := moveAside(mount, own); err == nil {
			return &cgroups2{mount: mount, parent: own}, nil
		}
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("the server's cgroup " + own + " is not its own: run it in a systemd unit with Delegate=yes")
	}
	return &cgroups2{mount: mount, parent: "/nbd", made: true}, nil
}

// cgroup1Paths returns the server's own groups: those of v1 by controller, and
// that of v2.
func cgroup1Paths() (map[string]string, string, error) {
	legacy, unified, err := cgroups.ParseCgroupFileUnified("/proc/self/cgroup")
	if err != nil {
		return nil, "", fmt.Errorf("read own cgroup: %w", err)
	}
	return legacy, unified, nil
}

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
	limit := int64(memoryMiB) << 20
	m, err := cgroup2.NewManager(c.mount, filepath.Join(c.parent, name),
		&cgroup2.Resources{Memory: &cgroup2.Memory{Max: &limit}})
	if err != nil {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	return &group2{m}, nil
}

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
