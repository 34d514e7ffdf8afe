package server

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto"
	"nbd/store"
	"nbd/vm"
)

func TestNearest(t *testing.T) {
	for _, tt := range []struct {
		versions string
		want     string
		nearest  string
	}{
		{"1.0 2.0 2.1", "2.0", "2.0"},
		{"1.9 2.0 3.0", "2.1", "2.0"},   // more components in common
		{"2.1 2.4 2.8", "2.5", "2.4"},   // the one before
		{"2.6 2.8", "2.5", "2.6"},       // or after
		{"2.1 2.6", "2.5", "2.1"},       // before rather than after
		{"1.0 1.9", "3.1", "1.9"},       // nothing in common
		{"10.1 9.1", "11", "10.1"},      // by number
		{"2.5pre 2.4", "2.5", "2.5pre"}, // components, not characters
		{"1 -", "-", "-"},
		{"1.2 -", "7", "1.2"},
	} {
		var runs []store.Run
		for _, v := range strings.Fields(tt.versions) {
			runs = append(runs, store.Run{Version: strings.Trim(v, "-")})
		}
		for range 2 {
			if got := nearest(runs, strings.Trim(tt.want, "-")); got == nil || got.Version != strings.Trim(tt.nearest, "-") {
				t.Errorf("of %s nearest to %s is %+v, want %s", tt.versions, tt.want, got, tt.nearest)
			}
			slices.Reverse(runs)
		}
	}
	if got := nearest(nil, "1"); got != nil {
		t.Errorf("of none: %+v", got)
	}
}

// TestKnown has a version that never succeeded beside one that did.
func TestKnown(t *testing.T) {
	good, bad := store.Run{Version: "1", Build: 1, MemoryMiB: 4096, PeakMemory: 5}, store.Run{Version: "2", Build: 2, ShortDiskMiB: 7}
	both := store.Run{Version: "1", Build: 2, MemoryMiB: 4096, PeakMemory: 5, ShortDiskMiB: 7}
	for _, tt := range []struct {
		runs    []store.Run
		version string
		want    *store.Run
	}{
		{nil, "1", nil}, {[]store.Run{bad}, "1", &bad}, {[]store.Run{good, bad}, "1", &good}, {[]store.Run{bad, good}, "3", &both},
	} {
		if diff := cmp.Diff(tt.want, known(tt.runs, tt.version)); diff != "" {
			t.Errorf("%s of %+v: %s", tt.version, tt.runs, diff)
		}
	}
}

func TestPlanFrom(t *testing.T) {
	const mib, minute = 1 << 20, time.Minute
	set := policy{cpus: 2, maxCPUs: 16, memoryMiB: 2048, maxMemoryMiB: 10000}
	for _, tt := range []struct {
		name string
		run  *store.Run
		want plan
		why  string
	}{
		{"nothing known", nil, plan{2, 2, 2048, 1024, 1024, ""}, "by the settings"},
		{"took little", &store.Run{CPUs: 2, MemoryMiB: 2048, DiskMiB: 1024, PeakMemory: 100 * mib, PeakDisk: 100 * mib, CPUTime: minute, Wall: minute},
			plan{2, 2, 2048, 1024, 256, ""}, "by the settings"},
		{"took more than the settings say", &store.Run{CPUs: 2, MemoryMiB: 8192, DiskMiB: 8192, PeakMemory: 4000 * mib, PeakDisk: 2000 * mib},
			plan{2, 2, 5120, 4096, 2560, ""}, "build 7 the package took 4000 MiB of memory, took 2000 MiB of disk"},
		{"had enough", &store.Run{MemoryMiB: 4096, DiskMiB: 2048, PeakMemory: 4096 * mib, PeakDisk: 2047 * mib},
			plan{2, 2, 4096, 2048, 2560, ""}, "took 4096 MiB of memory"},
		{"had too little", &store.Run{MemoryMiB: 2048, PeakMemory: 2000 * mib, ShortMemoryMiB: 3000},
			plan{2, 2, 6000, 1024, 1024, ""}, "had too little with 3000 MiB of memory"},
		{"never had enough", &store.Run{ShortMemoryMiB: 10000, ShortDiskMiB: 4096},
			plan{2, 2, 10000, 4096, 4096, ""}, "had too little with 10000 MiB of memory, had too little with 4096 MiB of disk"},
		{"kept all CPUs busy", &store.Run{CPUs: 4, CPUTime: 4 * minute, Wall: minute}, plan{8, 2, 2048, 1024, 1024, ""}, "kept 4.0 of 4 CPUs busy"},
		{"kept most CPUs busy", &store.Run{CPUs: 8, CPUTime: 5 * minute, Wall: 2 * minute}, plan{3, 2, 2048, 1024, 1024, ""}, "kept 2.5 of 8 CPUs busy"},
		{"kept one CPU busy", &store.Run{CPUs: 4, CPUTime: minute, Wall: minute}, plan{2, 2, 2048, 1024, 1024, ""}, "by the settings"},
		{"short", &store.Run{CPUs: 2, CPUTime: 18 * time.Second, Wall: 9 * time.Second}, plan{2, 2, 2048, 1024, 1024, ""}, "by the settings"},
		{"no more CPUs than there are", &store.Run{CPUs: 16, CPUTime: 16 * minute, Wall: minute}, plan{16, 2, 2048, 1024, 1024, ""}, "16 CPUs"},
		{"a clock that lies", &store.Run{CPUs: 2, CPUTime: 1 << 62, Wall: minute}, plan{4, 2, 2048, 1024, 1024, ""}, "kept 2.0 of 2 CPUs busy"},
	} {
		if tt.run != nil {
			tt.run.Build = 7
		}
		got := planFrom(tt.run, &set, 1024, 4096)
		why := got.why
		got.why = ""
		tt.want.writesMiB = min(tt.want.writesMiB, tt.want.diskMiB)
		if got != tt.want || !strings.Contains(why, tt.why) {
			t.Errorf("%s: %+v, %q; want %+v, %q", tt.name, got, why, tt.want, tt.why)
		}
	}
}

// resourcesOf are what records tell of the guests of builds.
func resourcesOf(list []store.Build) (texts []string) {
	for _, b := range list {
		texts = append(texts, fmt.Sprintf("%s %d+%d", b.Status, b.MemoryMiB, b.DiskMiB))
	}
	return texts
}

// lastWhy is the last reason that a record has for what its guest got.
func lastWhy(b store.Build) (why string) {
	for _, d := range b.Decisions {
		if d.Check == "resources" {
			why = d.Reason
		}
	}
	return why
}

// TestBuildsGetMore has a package that needs more memory and disk than the
// settings say, and what its next version begins with.
func TestBuildsGetMore(t *testing.T) {
	bt := newBuildTest(t, func(c *BuildsConfig) {
		c.MemoryMiB, c.MaxMemoryMiB, c.ScratchMiB, c.MaxScratchMiB = 1000, 5000, 1024, 8192
	})
	needs := func(memory, disk int) func(*fakeRun) error {
		return func(f *fakeRun) error {
			switch {
			case f.spec.MemoryMiB < memory:
				return &vm.BuildError{Kind: vm.OutOfMemory, Message: "out of memory"}
			case f.spec.ScratchMiB < disk:
				return &vm.BuildError{Kind: vm.NoSpace, Message: "no space"}
			}
			f.result.PeakMemory, f.result.PeakScratch = int64(memory)<<20, int64(disk)<<20
			return f.writeContent()
		}
	}
	bt.runner.act("hungry-1.0", needs(3000, 3000))
	bt.runner.act("hungry-1.1", needs(3500, 3000))
	bt.runner.act("hungry-2.0", needs(6000, 0))
	bt.runner.act("hungry-3.0", needs(0, 9000))
	r, sink := bt.build(bt.request(drv("hungry-1.0")))
	wantStatus(t, r, nixproto.Built)
	if notes := strings.Join(sink.notes, "\n"); !strings.Contains(notes, "out of memory; trying again with 2000 MiB\n") || !strings.Contains(notes, "no space; trying again with 4096 MiB of disk") {
		t.Errorf("notes %q", notes)
	}
	first := bt.records()
	want := []string{"out_of_memory 1000+1024", "out_of_memory 2000+1024", "out_of_memory 4000+1024", "out_of_memory 4000+2048", "built 4000+4096"}
	if diff := cmp.Diff(want, resourcesOf(first)); diff != "" {
		t.Error(diff)
	}
	for i := range first[1:] {
		if first[i].RestartedAs != first[i+1].ID || first[i+1].RestartOf != first[i].ID {
			t.Errorf("records %d and %d are not linked: %+v", i, i+1, first[i])
		}
	}
	if why := lastWhy(first[1]); why != "2000 MiB of memory, for the run before it had too little with 1000 MiB" {
		t.Errorf("why %q", why)
	}
	for _, b := range first[:4] {
		if b.CPUSeconds != 0 {
			t.Errorf("%s costs %d s", b.Status, b.CPUSeconds)
		}
	}

	// The next version begins with what was enough for this one.
	r, _ = bt.build(bt.request(drv("hungry-1.1")))
	wantStatus(t, r, nixproto.Built)
	second := bt.records()[len(first):]
	if diff := cmp.Diff([]string{"built 3840+4096"}, resourcesOf(second)); diff != "" {
		t.Error(diff)
	}
	if why, want := lastWhy(second[0]), fmt.Sprintf(": as of build %d the package took 3000 MiB of memory, took 3000 MiB of disk", first[4].ID); !strings.HasSuffix(why, want) {
		t.Errorf("why %q, want %q", why, want)
	}

	// What is never enough ends so, and the next request begins there.
	for _, name := range []string{"hungry-2.0", "hungry-3.0"} {
		for i := range 2 {
			before := len(bt.records())
			r, _ = bt.build(bt.request(drv(name)))
			wantStatus(t, r, nixproto.MiscFailure)
			got := resourcesOf(bt.records()[before:])
			if !strings.HasPrefix(got[len(got)-1], "max_memory_exceeded") || i == 1 && len(got) != 1 {
				t.Errorf("%s: %q", name, got)
			}
		}
	}

	// Nothing of that is other accounts', or other packages'.
	bob := bt.party("bob")
	r, _ = bob.build(bt.request(drv("hungry-1.2")))
	wantStatus(t, r, nixproto.Built)
	list := bt.requestsOf(bob.ID)
	if got := resourcesOf(list); got[0] != "built 1000+1024" || !strings.HasSuffix(lastWhy(list[0]), "by the settings") {
		t.Errorf("bob: %q, %q", got, lastWhy(list[0]))
	}
	r, _ = bt.build(bt.request(drv("hungrier-1.0")))
	wantStatus(t, r, nixproto.Built)
	if got := resourcesOf(bt.records()); got[len(got)-1] != "built 1000+1024" {
		t.Errorf("another package: %q", got)
	}
}

// TestRetryWritesMore has a build that fills its disk: the next run is expected to
// write as much as it may then.
func TestRetryWritesMore(t *testing.T) {
	bt := newBuildTest(t, func(c *BuildsConfig) { c.ScratchMiB, c.MaxScratchMiB = 2048, 8192 })
	var got []int
	bt.runner.act("x", func(f *fakeRun) error {
		bt.queue.mu.Lock()
		got = append(got, bt.queue.writes)
		bt.queue.mu.Unlock()
		switch f.try {
		case 1, 2:
			return &vm.BuildError{Kind: vm.NoSpace, Message: "no space"}
		case 3:
			return errors.New("the guest died")
		}
		return f.writeContent()
	})
	r, _ := bt.build(bt.request(drv("x")))
	wantStatus(t, r, nixproto.Built)
	if want := []int{usualDiskMiB, 4096, 8192, 8192}; !slices.Equal(got, want) {
		t.Errorf("expected to write %v MiB, want %v", got, want)
	}
}

// TestBuildsGetMoreCPUs has a package that keeps all CPUs busy.
func TestBuildsGetMoreCPUs(t *testing.T) {
	bt := newBuildTest(t, func(c *BuildsConfig) { c.CPUs = 2 })
	for n := range 6 {
		bt.runner.act(fmt.Sprintf("busy-%d", n), func(f *fakeRun) error {
			f.result.Stop = f.result.Start.Add(time.Minute)
			f.result.CPUUser, f.result.CPUSystem = time.Duration(f.spec.Cores)*time.Minute, 0
			return f.writeContent()
		})
	}
	var got []int
	build := func(p *party, n int) {
		t.Helper()
		r, _ := p.build(bt.request(drv(fmt.Sprintf("busy-%d", n))))
		wantStatus(t, r, nixproto.Built)
		list := bt.records()
		got = append(got, list[len(list)-1].CPUs)
	}
	for n := range 4 {
		build(bt.alice(), n)
	}
	build(bt.alice().with("NBD_MAX_CPU", "3"), 4)
	build(bt.alice().with("NBD_MIN_CPU", "12"), 5)
	if want := []int{2, 4, 8, 8, 3, 12}; !slices.Equal(got, want) {
		t.Errorf("CPUs %v, want %v", got, want)
	}
}

// TestPlanIsNotTold has two accounts wait for one run: what it got for the
// history of one is not told to the other.
func TestPlanIsNotTold(t *testing.T) {
	bt := newBuildTest(t, func(c *BuildsConfig) { c.MemoryMiB, c.Room.Guests = 1000, 1 })
	block, blocked := make(chan struct{}), make(chan struct{})
	bt.runner.act("block", func(f *fakeRun) error { close(blocked); <-block; return f.writeContent() })
	bob := bt.party("bob")
	bt.st.NoteRun(bob.ID, store.Run{System: "x86_64-linux", Package: "x", Build: 99, MemoryMiB: 4000, PeakMemory: 4000 << 20})
	if err := bt.st.EndBuild(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { bt.build(bt.request(drv("block"))) })
	<-blocked
	req := bt.request(drv("x"))
	bt.flush()
	waiting := func(n int) {
		for len(bt.Queue()) < n {
			time.Sleep(time.Millisecond)
		}
	}
	for n, p := range []*party{bt.alice(), bob} {
		wg.Go(func() {
			r, _ := p.build(req)
			wantStatus(t, r, nixproto.Built)
		})
		waiting(n + 1)
	}
	close(block)
	wg.Wait()
	list := bt.records()
	last := list[len(list)-1]
	if last.MemoryMiB != 4000 || lastWhy(last) != "2 CPUs, 4000 MiB of memory, 1024 MiB of disk, the most that is wanted by those who wait" {
		t.Errorf("%d MiB, %q", last.MemoryMiB, lastWhy(last))
	}
}

// TestBurst has more requests at once than a small machine can run: all end, each
// was run once, and never more ran than there was room for.
func TestBurst(t *testing.T) {
	const requests = 50
	bt := newBuildTest(t, func(c *BuildsConfig) {
		c.MemoryMiB, c.Room = 1000, Room{Guests: 100, MemoryMiB: 3 * vm.MemoryCostMiB(1000), CPUs: 100}
	})
	var reqs []*BuildRequest
	all := make(chan struct{}) // closed when all have come
	for n := range requests {
		name := fmt.Sprint("burst", n)
		bt.runner.act(name, func(f *fakeRun) error { <-all; return f.writeContent() })
		reqs = append(reqs, bt.request(drv(name)))
	}
	bt.flush()
	var wg sync.WaitGroup
	var mu sync.Mutex
	waited := 0
	for _, req := range reqs {
		wg.Go(func() {
			r, sink := bt.build(req)
			wantStatus(t, r, nixproto.Built)
			mu.Lock()
			defer mu.Unlock()
			for _, w := range sink.waits {
				if strings.HasPrefix(w, "waiting for free memory: ") {
					waited++
					break
				}
			}
		})
	}
	for len(bt.Queue()) < requests-3 {
		time.Sleep(time.Millisecond)
	}
	close(all)
	wg.Wait()
	for n := range requests {
		if got := bt.runner.count(fmt.Sprint("burst", n)); got != 1 {
			t.Errorf("build %d ran %d times", n, got)
		}
	}
	if bt.runner.most > 3 {
		t.Errorf("%d ran at once", bt.runner.most)
	}
	if waited != requests-3 {
		t.Errorf("%d were told what they wait for", waited)
	}
	if s := bt.QueueStatus(); s.Running != 0 || s.Waiting != 0 || s.Free != s.Total {
		t.Errorf("afterwards: %+v", s)
	}
}
