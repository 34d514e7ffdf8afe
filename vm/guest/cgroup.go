package guest

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// reservedMemory is what the build leaves to the kernel and the agent.
const reservedMemory = 64 << 20

// A cgroup bounds all processes of a build and counts what they use.
type cgroup struct{ dir string }

// newCgroup makes the build's group below root, the mount point of cgroup v2.
// A limit of 0 is none.
func newCgroup(root string, memory int64, processes int) (*cgroup, error) {
	if err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+memory +pids +cpu"), 0); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	c := &cgroup{filepath.Join(root, "build")}
	if err := os.Mkdir(c.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	limits := [][2]string{{"memory.oom.group", "1"}}
	if memory > 0 {
		limits = append(limits, [2]string{"memory.max", strconv.FormatInt(memory, 10)})
	}
	if processes > 0 {
		limits = append(limits, [2]string{"pids.max", strconv.Itoa(processes)})
	}
	for _, l := range limits {
		if err := os.WriteFile(filepath.Join(c.dir, l[0]), []byte(l[1]), 0); err != nil {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
	}
	return c, nil
}

// open returns the group's directory, for clone3.
func (c *cgroup) open() (*os.File, error) { return os.Open(c.dir) }

// kill ends all processes of the group and waits until they are gone.
func (c *cgroup) kill() error {
	if err := os.WriteFile(filepath.Join(c.dir, "cgroup.kill"), []byte("1"), 0); err != nil {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	events, err := unix.Open(filepath.Join(c.dir, "cgroup.events"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	defer unix.Close(events)
	for start := time.Now(); time.Since(start) < time.Minute; {
		counts, err := c.counts("cgroup.events")
		if err != nil {
			return fmt.Errorf("kill cgroup: %w", err)
		}
		if counts["populated"] == 0 {
			return nil
		}
		// The file says POLLPRI when it changes.
		pfd := []unix.PollFd{{Fd: int32(events), Events: unix.POLLPRI}}
		if _, err := unix.Poll(pfd, 1000); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("kill cgroup: %w", err)
		}
	}
	return errors.New("kill cgroup: processes do not end")
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
	cpu, err := c.counts("cpu.stat")
	if err != nil {
		return u, err
	}
	u.cpuUser = time.Duration(cpu["user_usec"]) * time.Microsecond
	u.cpuSystem = time.Duration(cpu["system_usec"]) * time.Microsecond
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

// counts reads a file of lines "name number".
func (c *cgroup) counts(file string) (map[string]int64, error) {
	f, err := os.Open(filepath.Join(c.dir, file))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	counts := map[string]int64{}
	for s := bufio.NewScanner(f); s.Scan(); {
		name, value, _ := strings.Cut(s.Text(), " ")
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", file, err)
		}
		counts[name] = n
	}
	return counts, nil
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
