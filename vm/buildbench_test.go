package vm

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// These benchmarks run builds that do nothing, in guests whose init is nbd as
// it ships. Beside wall time they report the CPU time of QEMU, "guest-s", and of this
// process, which stands for the server, "host-s"; and what it takes from the
// request to the builder's first words: "begin-s" of wall time and
// "guest-begin-s" of QEMU's CPU time.

// BenchmarkBuildRestored builds in a clone of a template.
func BenchmarkBuildRestored(b *testing.B) { benchmarkBuild(b, false) }

// BenchmarkBuildCold builds in a guest that boots.
func BenchmarkBuildCold(b *testing.B) { benchmarkBuild(b, true) }

func benchmarkBuild(b *testing.B, cold bool) {
	init := filepath.Join(b.TempDir(), "nbd")
	compile := exec.Command("go", "build", "-trimpath", "-o", init, "nbd")
	compile.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := compile.CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	blobs := memBlobs{}
	r := newTestRunner(b, blobs, func(c *Config) { c.ColdBoot, c.Binary = cold, init })
	s := shellSpec("bench", "echo begun; echo > $out", blobs, file("an input\n"), b)
	var waited, begun, all time.Duration
	run := func() {
		var first, after atomic.Int64 // CPU time when the log began, and how long after the request
		before, start := childrenCPU(b), time.Now()
		log := writerFunc(func(p []byte) (int, error) {
			after.CompareAndSwap(0, int64(time.Since(start)))
			first.CompareAndSwap(0, int64(guestCPU(b)))
			return len(p), nil
		})
		ctx, stop := context.WithTimeout(b.Context(), 5*time.Minute)
		defer stop()
		if _, err := r.Run(ctx, s, log, new(memOutputs)); err != nil {
			b.Fatal(err)
		}
		waited += time.Duration(after.Load())
		begun += time.Duration(first.Load())
		all += childrenCPU(b) - before
	}
	run() // makes the template
	waited, begun, all = 0, 0, 0
	own := ownCPU(b)
	for b.Loop() {
		run()
	}
	n := float64(b.N)
	b.ReportMetric(waited.Seconds()/n, "begin-s")
	b.ReportMetric(begun.Seconds()/n, "guest-begin-s")
	b.ReportMetric(all.Seconds()/n, "guest-s")
	b.ReportMetric((ownCPU(b)-own).Seconds()/n, "host-s")
}

// guestCPU returns the CPU time of the one guest that runs, which is a child of
// this process.
func guestCPU(b *testing.B) time.Duration {
	for _, pid := range guestPIDs(b) {
		var t unix.Timespec
		// The CPU clock of a process, as clock_getcpuclockid(3) makes its number.
		if err := unix.ClockGettime(int32(^pid<<3|2), &t); err != nil {
			b.Error(err)
		}
		return time.Duration(t.Nano())
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
