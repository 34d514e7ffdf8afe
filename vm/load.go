package vm

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
)

// A Load is what all guests together take of the host now, in MiB.
type Load struct{ MemoryMiB, DiskMiB int }

// Load tells what the guests that run take of the host now: the memory of their
// QEMUs, and what their scratch disks occupy.
func (r *Runner) Load() Load {
	return Load{MemoryMiB: int(r.processes.resident() >> 20), DiskMiB: int(r.scratches.taken() >> 20)}
}

// processes are the QEMUs that run. Its methods may be called concurrently.
type processes struct {
	mu   sync.Mutex // guards pids
	pids map[int]bool
}

// add notes a process; remove must be called when it has ended.
func (p *processes) add(pid int) (remove func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pids == nil {
		p.pids = make(map[int]bool)
	}
	p.pids[pid] = true
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.pids, pid)
	}
}

// resident returns how many bytes of memory the processes have.
func (p *processes) resident() (bytes int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for pid := range p.pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if err != nil {
			continue // it has just ended
		}
		bytes += residentOf(string(text))
	}
	return bytes
}

// residentOf reads the second number of /proc/PID/statm (proc_pid_statm(5)), of
// pages.
func residentOf(statm string) int64 {
	words := strings.Fields(statm)
	if len(words) < 2 {
		return 0
	}
	pages, err := strconv.ParseInt(words[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}
