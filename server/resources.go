package server

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
	"nbd/vm"
)

// What a guest begins with: what the settings say, or more, if the account's own
// runs of the same package on the same system, of the nearest version, took more.
//
//	memory   the peak of the last success and a quarter, but not more than that
//	         run had, for that was enough; twice what was too little since
//	disk     the same
//	CPUs     as many as it kept busy (CPU time by wall time, rounded up); twice
//	         what it had if it kept nearly all of that busy. Runs that were short
//	         say nothing.
//
// It stays within max-mem, --max-scratch and max-cpu. More CPUs than the settings
// say are a wish: a build takes those that are free. A run that met the end of its
// memory or disk all the same is run again with twice as much.
const (
	shortRun     = 10 * time.Second
	nearlyAll    = 0.8
	memoryStep   = 256  // MiB to which needs are rounded up
	usualDiskMiB = 1024 // that a build is expected to write of which nothing is known
)

// A plan is what the guest of a request begins with.
type plan struct {
	cpus, leastCPUs    int // wished, and what it begins with if no more are free
	memoryMiB, diskMiB int
	// writesMiB is how much of the disk the build is expected to fill.
	writesMiB int
	why       string // one line for the account
}

// planFor decides what the guest of a request begins with.
func (b *Builds) planFor(ctx context.Context, r *request) {
	j := r.job
	pkg, version := nixproto.ParseName(j.drv.Name)
	runs, err := b.store.Runs(ctx, j.account, j.drv.System, pkg)
	if err != nil && ctx.Err() == nil { // the settings will do
		b.cfg.Logger.Error("history cannot be read", "account", j.account, "package", pkg, "err", err)
	}
	p := planFrom(known(runs, version), &j.set, b.cfg.ScratchMiB, b.cfg.MaxScratchMiB)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.plan = p
}

// planned returns what planFor decided.
func (r *request) planned() plan {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.plan
}

// known returns what is known for a version: of the nearest run, and of the
// nearest that succeeded, if the nearest has not. Nil if nothing is.
func known(runs []store.Run, version string) *store.Run {
	run := nearest(runs, version)
	if run == nil || run.MemoryMiB > 0 {
		return run
	}
	good := nearest(slices.DeleteFunc(slices.Clone(runs), func(r store.Run) bool { return r.MemoryMiB == 0 }), version)
	if good == nil {
		return run
	}
	both := *good
	both.Build, both.ShortMemoryMiB, both.ShortDiskMiB = run.Build, run.ShortMemoryMiB, run.ShortDiskMiB
	return &both
}

// nearest returns the run of that version, or else of the one that shares the
// most leading components with it, and of those the next one before it, or else
// after it. Nil if there are none.
func nearest(runs []store.Run, version string) *store.Run {
	var best *store.Run
	for i := range runs {
		if best == nil || nearer(runs[i].Version, best.Version, version) {
			best = &runs[i]
		}
	}
	return best
}

// nearer reports whether version a is nearer to v than b is.
func nearer(a, b, v string) bool {
	if a == v || b == v {
		return a == v
	}
	if x, y := nixproto.CommonComponents(a, v), nixproto.CommonComponents(b, v); x != y {
		return x > y
	}
	x, y := nixproto.CompareVersions(a, v), nixproto.CompareVersions(b, v)
	switch {
	case x <= 0 && y <= 0:
		return nixproto.CompareVersions(a, b) > 0
	case x > 0 && y > 0:
		return nixproto.CompareVersions(a, b) < 0
	}
	return x <= 0
}

// planFrom is the plan by settings and what is known of a run, which may be nil.
func planFrom(run *store.Run, set *policy, diskMiB, maxDiskMiB int) plan {
	p := plan{cpus: set.cpus, leastCPUs: set.cpus, memoryMiB: set.memoryMiB, diskMiB: diskMiB, writesMiB: min(usualDiskMiB, diskMiB)}
	if run == nil {
		p.why = p.String() + ", by the settings"
		return p
	}
	p.cpus = min(max(set.cpus, wantedCPUs(run)), set.maxCPUs)
	p.memoryMiB = min(max(set.memoryMiB, neededMiB(run.PeakMemory, run.MemoryMiB, run.ShortMemoryMiB)), set.maxMemoryMiB)
	p.diskMiB = diskOf(min(max(diskMiB, neededMiB(run.PeakDisk, run.DiskMiB, run.ShortDiskMiB)), maxDiskMiB))
	if n := neededMiB(run.PeakDisk, 0, run.ShortDiskMiB); n > 0 {
		p.writesMiB = min(n, p.diskMiB)
	}
	p.why = p.String() + ", by the settings"
	if more := p.because(run, set, diskMiB); len(more) > 0 {
		p.why = fmt.Sprintf("%s: as of build %d the package %s", p, run.Build, strings.Join(more, ", "))
	}
	return p
}

// because says which of what is known of a run had the plan be more than the
// settings say.
func (p *plan) because(run *store.Run, set *policy, diskMiB int) (more []string) {
	if p.memoryMiB > set.memoryMiB {
		more = append(more, took("memory", run.PeakMemory, run.ShortMemoryMiB))
	}
	if p.diskMiB > diskMiB {
		more = append(more, took("disk", run.PeakDisk, run.ShortDiskMiB))
	}
	if p.cpus > set.cpus {
		more = append(more, fmt.Sprintf("kept %.1f of %d CPUs busy", busyCPUs(run), run.CPUs))
	}
	return more
}

func took(what string, peak int64, shortMiB int) string {
	if shortMiB > 0 {
		return fmt.Sprintf("had too little with %d MiB of %s", shortMiB, what)
	}
	return fmt.Sprintf("took %d MiB of %s", mib(peak), what)
}

func (p plan) String() string {
	return fmt.Sprintf("%d CPUs, %d MiB of memory, %d MiB of disk", p.cpus, p.memoryMiB, p.diskMiB)
}

// mib rounds bytes up to MiB.
func mib(bytes int64) int { return int((bytes + 1<<20 - 1) >> 20) }

// neededMiB is how much of something to begin with, given the peak of a run in
// bytes, what it had, and what was too little since; 0 for each that is not
// known.
func neededMiB(peak int64, hadMiB, shortMiB int) int {
	n := mib(peak + peak/4)
	n = (n + memoryStep - 1) / memoryStep * memoryStep
	if hadMiB > 0 {
		n = min(n, hadMiB)
	}
	return max(n, 2*shortMiB)
}

// diskOf is the size of the disk that a guest really gets for n MiB.
func diskOf(n int) int {
	size, err := vm.ScratchSize(n)
	if err != nil { // never: n is at most what was found to be a size
		return n
	}
	return int(size >> 20)
}

// busyCPUs is how many CPUs a run kept busy on average.
func busyCPUs(run *store.Run) float64 {
	if run.Wall <= 0 {
		return 0
	}
	return min(float64(run.CPUTime)/float64(run.Wall), float64(run.CPUs))
}

// wantedCPUs is how many CPUs a run has shown to be of use; 0 if it says nothing.
func wantedCPUs(run *store.Run) int {
	if run.Wall < shortRun {
		return 0
	}
	busy := busyCPUs(run)
	if busy >= nearlyAll*float64(run.CPUs) {
		return 2 * run.CPUs
	}
	return int(math.Ceil(busy))
}

// more returns what an attempt after one that had too little is given instead,
// and says why; nothing changes after other ends.
func (a *attempt) more(end *ending, ceilingMiB, maxDiskMiB int) (memoryMiB, diskMiB int, why string) {
	memoryMiB, diskMiB = a.memoryMiB, a.diskMiB
	switch end.short {
	case vm.OutOfMemory:
		memoryMiB = min(2*a.memoryMiB, ceilingMiB)
		return memoryMiB, diskMiB, fmt.Sprintf("%d MiB of memory, for the run before it had too little with %d MiB", memoryMiB, a.memoryMiB)
	case vm.NoSpace:
		diskMiB = min(2*a.diskMiB, maxDiskMiB)
		return memoryMiB, diskMiB, fmt.Sprintf("%d MiB of disk, for the run before it filled %d MiB", diskMiB, a.diskMiB)
	}
	return memoryMiB, diskMiB, ""
}

// whyLocked says to the owner of an attempt, which is r with its mu held, why it
// got what it got. What others who wait asked for is not told.
func (a *attempt) whyLocked(r *request) string {
	got := plan{cpus: a.cpus, memoryMiB: a.memoryMiB, diskMiB: a.diskMiB}
	switch {
	case a.why != "":
		return a.why
	case a.wantedBy != r.record.ID:
		return got.String() + ", the most that is wanted by those who wait"
	case a.cpus < r.plan.cpus:
		return fmt.Sprintf("%s; %d CPUs were free", r.plan.why, a.cpus)
	}
	return r.plan.why
}

// noteRun keeps what an attempt took for the next ones of the package. It is
// called with the owner's mu held.
func (b *Builds) noteRun(a *attempt, rec *store.Build, end *ending) {
	run := store.Run{System: rec.System, Build: rec.ID, Time: rec.Stopped}
	run.Package, run.Version = nixproto.ParseName(rec.Name)
	switch {
	case end.status == reuse.Built:
		res := &end.result
		run.CPUs, run.MemoryMiB, run.DiskMiB = a.cpus, a.memoryMiB, a.diskMiB
		run.PeakMemory, run.PeakDisk = res.PeakMemory, res.PeakScratch
		run.CPUTime, run.Wall = res.CPUUser+res.CPUSystem, res.Stop.Sub(res.Start)
	case end.short == vm.OutOfMemory || end.short == vm.NoSpace:
		known, err := b.store.Runs(context.Background(), rec.Account, run.System, run.Package)
		if err != nil {
			b.cfg.Logger.Error("history cannot be read", "account", rec.Account, "package", run.Package, "err", err)
			return
		}
		if old := nearest(known, run.Version); old != nil && old.Version == run.Version {
			old.Build, old.Time = run.Build, run.Time
			run = *old
		}
		if end.short == vm.OutOfMemory {
			run.ShortMemoryMiB = max(run.ShortMemoryMiB, a.memoryMiB)
		} else {
			run.ShortDiskMiB = max(run.ShortDiskMiB, a.diskMiB)
		}
	default:
		return
	}
	b.store.NoteRun(rec.Account, run)
}
