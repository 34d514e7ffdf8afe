package guest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// reservedMemory is what the build leaves to the kernel and the agent.
const reservedMemory = 64 << 20

// A cgroup bounds all processes of a build and counts what they use.
type cgroup struct {
	dir string
	// before is the CPU time used before the build began.
	before usage
}

// newCgroup makes the build's group below root, the mount point of cgroup v2.
func newCgroup(root string) (*cgroup, error) {
	c := &cgroup{dir: filepath.Join(root, "build")}
	err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+memory +pids +cpu +cpuset"), 0)
	if err == nil {
		err = os.Mkdir(c.dir, 0o755)
	}
	if err == nil {
		err = c.set("memory.oom.group", "1")
	}
	if err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	return c, nil
}

// begin bounds the group for a build: memory in bytes, the number of processes,
// and that of processors, of which the build gets the first ones. A bound of 0
// is none.
func (c *cgroup) begin(memory int64, processes, cpus int) error {
	limits := [][2]string{}
	if memory > 0 {
		limits = append(limits, [2]string{"memory.max", strconv.FormatInt(memory, 10)})
	}
	if processes > 0 {
		limits = append(limits, [2]string{"pids.max", strconv.Itoa(processes)})
	}
	if 0 < cpus && cpus < runtime.NumCPU() {
		limits = append(limits, [2]string{"cpuset.cpus", fmt.Sprintf("0-%d", cpus-1)})
	}
	for _, l := range limits {
		if err := c.set(l[0], l[1]); err != nil {
			return fmt.Errorf("bound cgroup: %w", err)
		}
	}
	return c.readCPU(&c.before)
}

func (c *cgroup) set(name, value string) error {
	return os.WriteFile(filepath.Join(c.dir, name), []byte(value), 0)
}

// open returns the group's directory, for clone3.
func (c *cgroup) open() (*os.File, error) { return os.Open(c.dir) }

// killDeadline is how long killed processes may take to end.
const killDeadline = time.Minute

// kill ends all processes of the group and waits until they are gone.
func (c *cgroup) kill() error {
	if err := os.WriteFile(filepath.Join(c.dir, "cgroup.kill"), []byte("1"), 0); err != nil {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	events, err := c.events("cgroup.events")
	if err != nil {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	defer events.Close() // only read from
	for start := time.Now(); time.Since(start) < killDeadline; {
		counts, err := readCounts(events)
		if err != nil {
			return fmt.Errorf("kill cgroup: %w", err)
		}
		if counts["populated"] == 0 {
			return nil
		}
		if err := awaitEvent(events, nil, time.Second); err != nil {
			return fmt.Errorf("kill cgroup: %w", err)
		}
	}
	return errors.New("kill cgroup: processes do not end")
}

// onProcessLimit calls limit once when a fork was refused because of the
// group's limit. It watches until stop is called, which waits for its end.
func (c *cgroup) onProcessLimit(limit func()) (stop func() error, err error) {
	events, err := c.events("pids.events")
	if err != nil {
		return nil, err
	}
	stopped, stopper, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, events.Close())
	}
	watched := make(chan error, 1)
	go func() { watched <- watchLimit(events, stopped, limit) }()
	return func() error {
		err := stopper.Close()
		return errors.Join(err, <-watched, stopped.Close(), events.Close())
	}, nil
}

// watchLimit returns when the limit was met or stopped is closed at its other
// end.
func watchLimit(events, stopped *os.File, limit func()) error {
	for {
		counts, err := readCounts(events)
		if err != nil {
			return fmt.Errorf("watch process limit: %w", err)
		}
		if counts["max"] > 0 {
			limit()
			return nil
		}
		if err := awaitEvent(events, stopped, -1); errors.Is(err, os.ErrClosed) {
			return nil
		} else if err != nil {
			return fmt.Errorf("watch process limit: %w", err)
		}
	}
}

// events opens a file of the group that tells of its changes.
func (c *cgroup) events(name string) (*os.File, error) {
	fd, err := unix.Open(filepath.Join(c.dir, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// awaitEvent returns when an events file has changed since it was read through
// this descriptor, or after a time; negative is for ever. It returns
// os.ErrClosed if the other end of the pipe stopped is closed.
func awaitEvent(events, stopped *os.File, d time.Duration) error {
	fds := []unix.PollFd{{Fd: int32(events.Fd()), Events: unix.POLLPRI}}
	if stopped != nil {
		fds = append(fds, unix.PollFd{Fd: int32(stopped.Fd())})
	}
	ms := -1
	if d >= 0 {
		ms = int(d / time.Millisecond)
	}
	if _, err := unix.Poll(fds, ms); err != nil && !errors.Is(err, unix.EINTR) {
		return err
	}
	if stopped != nil && fds[1].Revents != 0 {
		return os.ErrClosed
	}
	return nil
}

// A usage is what a cgroup has used and met so far.
type usage struct {
	cpuUser, cpuSystem time.Duration
	peakMemory         int64
	oomKills           int64
	processLimit       int64
}

func (c *cgroup) usage() (usage, error) {
	var u usage
	if err := c.readCPU(&u); err != nil {
		return u, err
	}
	// The kernel splits the time anew at each look.
	u.cpuUser, u.cpuSystem = max(0, u.cpuUser-c.before.cpuUser), max(0, u.cpuSystem-c.before.cpuSystem)
	memory, err := c.counts("memory.events")
	if err != nil {
		return u, err
	}
	u.oomKills = memory["oom_kill"]
	pids, err := c.counts("pids.events")
	if err != nil {
		return u, err
	}
	u.processLimit = pids["max"]
	peak, err := os.ReadFile(filepath.Join(c.dir, "memory.peak"))
	if errors.Is(err, os.ErrNotExist) {
		return u, nil // kernels before 5.19
	}
	if err != nil {
		return u, err
	}
	u.peakMemory, err = strconv.ParseInt(strings.TrimSpace(string(peak)), 10, 64)
	return u, err
}

// readCPU fills in how much time all processors together have spent.
func (c *cgroup) readCPU(u *usage) error {
	cpu, err := c.counts("cpu.stat")
	if err != nil {
		return err
	}
	u.cpuUser = time.Duration(cpu["user_usec"]) * time.Microsecond
	u.cpuSystem = time.Duration(cpu["system_usec"]) * time.Microsecond
	return nil
}

// counts reads a file of lines "name number".
func (c *cgroup) counts(name string) (map[string]int64, error) {
	f, err := os.Open(filepath.Join(c.dir, name))
	if err != nil {
		return nil, err
	}
	defer f.Close() // only read from
	return readCounts(f)
}

// readCounts reads such a file from its start.
func readCounts(f *os.File) (map[string]int64, error) {
	counts := map[string]int64{}
	s := bufio.NewScanner(io.NewSectionReader(f, 0, 1<<20))
	for s.Scan() {
		name, value, _ := strings.Cut(s.Text(), " ")
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", f.Name(), err)
		}
		counts[name] = n
	}
	return counts, s.Err()
}

// memoryLimit returns the memory.max of a build that may use mib MiB, 0 for as
// much as there is.
func memoryLimit(mib int) (int64, error) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0, fmt.Errorf("sysinfo: %w", err)
	}
	limit := int64(si.Totalram)*int64(si.Unit) - reservedMemory
	if mib > 0 {
		limit = min(limit, int64(mib)<<20)
	}
	if limit <= 0 {
		return 0, errors.New("the guest has no memory for a build")
	}
	return limit, nil
}
