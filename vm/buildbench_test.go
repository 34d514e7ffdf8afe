package vm

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// These benchmarks run builds in guests whose init is nbd as it ships. Beside wall
// time they report the CPU time of QEMU, "guest-s", and of this process, which
// stands for the server, "host-s".

// BenchmarkBuild runs builds that do nothing, in turn in a guest that boots, in a
// clone of a template, and so on. It reports the medians of what passes, and what
// CPU time QEMU uses, from the request to the builder's first instruction
// ("cold-s", "warm-s", "cold-guest-s", "warm-guest-s") and what part of the first
// the second is; and the CPU time of whole builds in clones.
func BenchmarkBuild(b *testing.B) {
	init := shippedInit(b)
	blobs := memBlobs{}
	s := shellSpec("bench", "echo begun; echo > $out", blobs, file("an input\n"), b)
	var begin, cpu [2][]time.Duration // cold and warm
	var runners [2]*Runner
	for i := range runners {
		runners[i] = newTestRunner(b, blobs, func(c *Config) { c.ColdBoot, c.Binary = i == 0, init })
	}
	warmUp(b, runners[1], s)
	var guests, host time.Duration
	for b.Loop() {
		for i, r := range runners {
			own := ownCPU(b)
			m := measureBuild(b, r, s)
			if m.restored != (i == 1) {
				b.Fatalf("restored: %v", m.restored)
			}
			begin[i], cpu[i] = append(begin[i], m.begin), append(cpu[i], m.beginCPU)
			if i == 1 {
				guests, host = guests+m.guest, host+ownCPU(b)-own
			}
		}
	}
	b.ReportMetric(0, "ns/op") // of both together means nothing
	for i, name := range []string{"cold", "warm"} {
		b.ReportMetric(median(begin[i]).Seconds(), name+"-s")
		b.ReportMetric(median(cpu[i]).Seconds(), name+"-guest-s")
	}
	b.ReportMetric(float64(median(begin[1]))/float64(median(begin[0])), "warm/cold")
	b.ReportMetric(float64(median(cpu[1]))/float64(median(cpu[0])), "warm/cold-guest")
	b.ReportMetric(guests.Seconds()/float64(b.N), "guest-s")
	b.ReportMetric(host.Seconds()/float64(b.N), "host-s")
}

// BenchmarkOutputs runs builds that make 10,000 small files, or a large one, and
// reports what passes while the builder makes them ("build-s"), and from its end
// until the host has them ("back-s").
func BenchmarkOutputs(b *testing.B) {
	init := shippedInit(b)
	for _, tt := range []struct{ name, script string }{
		{"10000-files", "mkdir $out; i=0; while [ $i -lt 10000 ]; do echo $i > $out/$i; i=$((i+1)); done"},
		{"1GiB", "dd if=/dev/zero of=$out bs=1M count=1024"},
	} {
		b.Run(tt.name, func(b *testing.B) {
			blobs := memBlobs{}
			r := newTestRunner(b, blobs, func(c *Config) { c.Binary = init })
			s := shellSpec("bench", tt.script, blobs, file("x"), b)
			s.MemoryMiB, s.ScratchMiB = 2048, 4096
			warmUp(b, r, s)
			var sum buildMeasure
			own := ownCPU(b)
			for b.Loop() {
				m := measureBuild(b, r, s)
				sum.build, sum.back, sum.guest = sum.build+m.build, sum.back+m.back, sum.guest+m.guest
			}
			n := float64(b.N)
			b.ReportMetric(sum.build.Seconds()/n, "build-s")
			b.ReportMetric(sum.back.Seconds()/n, "back-s")
			b.ReportMetric(sum.guest.Seconds()/n, "guest-s")
			b.ReportMetric((ownCPU(b)-own).Seconds()/n, "host-s")
		})
	}
}

// shippedInit returns nbd as it ships.
func shippedInit(b *testing.B) string {
	init := filepath.Join(b.TempDir(), "nbd")
	compile := exec.Command("go", "build", "-trimpath", "-o", init, "nbd")
	compile.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := compile.CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	return init
}

// A buildMeasure is what one build took.
type buildMeasure struct {
	begin, build, back time.Duration // to the builder's start, to its end, to the end of all
	beginCPU, guest    time.Duration // of QEMU: to the builder's first words, and in all
	restored           bool
}

func measureBuild(b *testing.B, r *Runner, s *Spec) (m buildMeasure) {
	var first atomic.Int64
	log := writerFunc(func(p []byte) (int, error) {
		first.CompareAndSwap(0, int64(guestCPU(b)))
		return len(p), nil
	})
	ctx, stop := context.WithTimeout(b.Context(), 20*time.Minute)
	defer stop()
	before, start := childrenCPU(b), time.Now()
	res, err := r.Run(ctx, s, log, new(forgetful))
	if err != nil {
		b.Fatal(err)
	}
	return buildMeasure{
		begin: res.Start.Sub(start), build: res.Stop.Sub(res.Start), back: time.Since(res.Stop),
		beginCPU: time.Duration(first.Load()), guest: childrenCPU(b) - before, restored: res.Restored,
	}
}

// forgetful takes outputs and keeps nothing of them.
type forgetful struct{}

func (*forgetful) Create(context.Context, string) (OutputWriter, error) { return forgetful{}, nil }
func (forgetful) Write(p []byte) (int, error)                           { return len(p), nil }
func (forgetful) Close() error                                          { return nil }
func (forgetful) Abort()                                                {}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

// guestCPU returns the CPU time of the one guest that runs, which is a child of
// this process.
func guestCPU(b *testing.B) time.Duration {
	for _, pid := range guestPIDs(b) {
		return processCPU(b, pid)
	}
	return 0
}

// childrenCPU returns the CPU time of all children that have ended.
func childrenCPU(b *testing.B) time.Duration { return usage(b, syscall.RUSAGE_CHILDREN) }

// ownCPU returns the CPU time of this process.
func ownCPU(b *testing.B) time.Duration { return usage(b, syscall.RUSAGE_SELF) }

func usage(b *testing.B, who int) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(who, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
