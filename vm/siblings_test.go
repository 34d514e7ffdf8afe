package vm

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// siblingCount is how many start at once.
const siblingCount = 8

// Clones of one template, started all at once, have nothing random in common, and
// the right time.
func TestSiblings(t *testing.T) {
	blobs := memBlobs{}
	r := newTestRunner(t, blobs, nil)
	self, err := os.ReadFile(buildProgram(t, "./testdata/sibling"))
	if err != nil {
		t.Fatal(err)
	}
	spec := func(i int) *Spec {
		s := shellSpec(fmt.Sprint("sibling", i), "", blobs, program(string(self)), t)
		s.Drv.Builder, s.Drv.Args = s.Drv.Env["in"], nil
		s.Cores = 1
		return s
	}
	specs := make([]*Spec, siblingCount)
	for i := range specs {
		specs[i] = spec(i)
	}
	warmUp(t, r, specs[0])
	sees := make([]map[string]string, siblingCount)
	var wg sync.WaitGroup
	for i, s := range specs {
		wg.Go(func() {
			var log bytes.Buffer
			res, err := r.Run(t.Context(), s, &log, new(memOutputs))
			if err != nil || !res.Restored {
				t.Errorf("restored: %v, %v\n%s", res != nil && res.Restored, err, log.String())
				return
			}
			sees[i] = map[string]string{}
			for line := range strings.Lines(log.String()) {
				name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
				sees[i][name] = value
			}
			checkTime(t, sees[i]["time"], res)
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	if len(sees[0]) != 14 {
		t.Errorf("a builder sees %d things: %v", len(sees[0]), sees[0])
	}
	for i, a := range sees {
		for _, b := range sees[:i] {
			for name, value := range a {
				if value == "" || value == b[name] {
					t.Errorf("%s is %q in two guests", name, value)
				}
			}
		}
	}
}

// checkTime compares what a builder took for the time with when it ran.
func checkTime(t *testing.T, text string, res *Result) {
	var nano int64
	if _, err := fmt.Sscan(text, &nano); err != nil {
		t.Errorf("time %q: %v", text, err)
		return
	}
	const tolerance = time.Second
	when := time.Unix(0, nano)
	if when.Before(res.Booted.Add(-tolerance)) || when.After(res.Stop.Add(tolerance)) {
		t.Errorf("the guest's clock said %v between %v and %v", when, res.Booted, res.Stop)
	}
}

// starts is how often TestStarts starts a guest.
var starts = flag.Int("starts", 50, "how often guests are started in a row")

// Guests start again and again without a failure.
func TestStarts(t *testing.T) {
	r := newTestRunner(t, nil, nil)
	spec := &Spec{Cores: 1, MemoryMiB: 512}
	warmUp(t, r, spec)
	p, err := r.platform(t.Context(), r.native)
	if err != nil {
		t.Fatal(err)
	}
	m, err := p.machineFor(spec)
	if err != nil {
		t.Fatal(err)
	}
	for i := range *starts {
		func() {
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			g, err := r.startGuest(ctx, p, m, emptyDisks(), spec)
			if err != nil || !g.restored {
				t.Fatalf("start %d: %v", i, err)
			}
			if err := g.close(); err != nil {
				t.Fatalf("end %d: %v", i, err)
			}
		}()
	}
}

// Processors of guests that get them on demand are brought up, those that a build
// is given and no others.
func TestProcessorsOnDemand(t *testing.T) {
	blobs := memBlobs{}
	r := newTestRunner(t, blobs, nil)
	p, err := r.platform(t.Context(), r.native)
	if err != nil {
		t.Fatal(err)
	}
	p.onDemand = true // as with hardware
	s := shellSpec("ondemand", "nproc; grep -c ^processor /proc/cpuinfo; echo > $out", blobs, file("x"), t)
	s.Cores = 3
	warmUp(t, r, s)
	var log bytes.Buffer
	res, err := r.Run(t.Context(), s, &log, new(memOutputs))
	if err != nil || !res.Restored || log.String() != "3\n3\n" {
		t.Errorf("%+v, %v, %q", res, err, log.String())
	}
}
