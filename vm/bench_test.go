package vm

import (
	"context"
	"testing"
	"time"
)

// benchmarkStart starts guests up to where they are awake, and reports QEMU's
// CPU time beside the wall time.
func benchmarkStart(b *testing.B, start func(context.Context, *Runner, *platform, machine) (*guestVM, error)) {
	r := newTestRunner(b, nil, nil)
	p, err := r.platform(b.Context(), r.native)
	if err != nil {
		b.Fatal(err)
	}
	m, err := p.machineFor(&Spec{Cores: 2, MemoryMiB: 2048})
	if err != nil {
		b.Fatal(err)
	}
	var cpu time.Duration
	for b.Loop() {
		g, err := start(b.Context(), r, p, m)
		if err != nil {
			b.Fatal(err)
		}
		if err := g.close(); err != nil {
			b.Fatal(err)
		}
		used := g.proc.cmd.ProcessState
		cpu += used.UserTime() + used.SystemTime()
	}
	b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s/op")
}

// BenchmarkStartCold boots a guest until it is awake.
func BenchmarkStartCold(b *testing.B) {
	benchmarkStart(b, func(ctx context.Context, r *Runner, p *platform, m machine) (*guestVM, error) {
		return r.cold(ctx, p, m, emptyDisks(), wholeMachine(m))
	})
}

// BenchmarkStartRestored starts a guest from a template until it is awake.
func BenchmarkStartRestored(b *testing.B) {
	var t *template
	benchmarkStart(b, func(ctx context.Context, r *Runner, p *platform, m machine) (*guestVM, error) {
		if t == nil {
			b.StopTimer()
			var err error
			if t, err = r.saveGuest(ctx, p, m); err != nil {
				return nil, err
			}
			b.Cleanup(t.release)
			b.StartTimer()
		}
		return r.clone(ctx, p, m, t, emptyDisks(), wholeMachine(m))
	})
}

// BenchmarkCopyTemplate copies the memory of a template.
func BenchmarkCopyTemplate(b *testing.B) {
	r := newTestRunner(b, nil, nil)
	p, err := r.platform(b.Context(), r.native)
	if err != nil {
		b.Fatal(err)
	}
	m, err := p.machineFor(&Spec{Cores: 2, MemoryMiB: 2048})
	if err != nil {
		b.Fatal(err)
	}
	t, err := r.saveGuest(b.Context(), p, m)
	if err != nil {
		b.Fatal(err)
	}
	defer t.release()
	size := int64(m.memoryMiB) << 20
	for b.Loop() {
		ram, err := memfd("copy", size)
		if err != nil {
			b.Fatal(err)
		}
		if err := copySparse(ram, t.ram, size); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(allocated(b, ram))/(1<<20), "MiB")
		if err := ram.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
