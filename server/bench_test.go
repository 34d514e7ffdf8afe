package server

import (
	"crypto/rand"
	"fmt"
	"io"
	"syscall"
	"testing"
	"time"

	"nbd/nixproto"
)

// The benchmarks speak over real SSH connections. Their CPU time is that of both
// ends: it serves to compare one version with another, and for profiles.
// contrib/bench measures the server alone, with stock clients.

// reportCPU reports CPU time for each iteration, from when it is called until
// the function returned is.
func reportCPU(b *testing.B) func() {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	b.ReportAllocs()
	b.ResetTimer()
	start := used()
	return func() { b.ReportMetric(float64(used()-start)/float64(time.Microsecond)/float64(b.N), "cpu-µs/op") }
}

// smallPaths returns n paths of 1500 bytes.
func smallPaths(b *testing.B, n int) []testPath {
	paths := make([]testPath, n)
	for i := range paths {
		paths[i] = builtPath(b, fmt.Sprintf("small-%d", i), fmt.Sprintf("%1500d", i))
	}
	return paths
}

// BenchmarkDownload fetches small paths as a client does: what is known, then
// the content.
func BenchmarkDownload(b *testing.B) {
	ts := newTestServer(b, nil)
	paths := smallPaths(b, 2000)
	ts.upload(ts.account.ID, paths...)
	w := ts.worker(ts.alice)
	defer reportCPU(b)()
	for i := range b.N {
		p := paths[i%len(paths)]
		if _, err := w.Do(&nixproto.QueryPathInfo{Path: p.Path}, nil); err != nil {
			b.Fatal(err)
		}
		if _, err := w.Do(&nixproto.NarFromPath{Path: p.Path}, nil); err != nil {
			b.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, w.Reader, int64(len(p.nar))); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkUploadEach brings small paths over the serve protocol, where each is
// acknowledged by itself.
func BenchmarkUploadEach(b *testing.B) {
	ts := newTestServer(b, nil)
	paths := smallPaths(b, b.N)
	c, _ := ts.serveClient(ts.alice)
	defer reportCPU(b)()
	for _, p := range paths {
		if _, err := c.Do(&nixproto.ServeAddToStoreNar{Info: p.PathInfo}, raw(p.nar)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkUploadBurst brings small paths in one burst.
func BenchmarkUploadBurst(b *testing.B) {
	ts := newTestServer(b, nil)
	paths := smallPaths(b, b.N)
	w := ts.worker(ts.alice)
	defer reportCPU(b)()
	if _, err := w.Do(&nixproto.AddMultipleToStore{}, burst(paths...)); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkUploadLarge brings a path of 64 MiB.
func BenchmarkUploadLarge(b *testing.B) {
	ts := newTestServer(b, nil)
	contents := make([]byte, 64<<20)
	if _, err := rand.Read(contents); err != nil {
		b.Fatal(err)
	}
	w := ts.worker(ts.alice)
	b.SetBytes(int64(len(contents)))
	defer reportCPU(b)()
	for i := range b.N {
		b.StopTimer()
		contents[0], contents[1] = byte(i), byte(i>>8)
		p := builtPath(b, fmt.Sprint("large-", i), string(contents))
		b.StartTimer()
		if _, err := w.Do(&nixproto.AddMultipleToStore{}, burst(p)); err != nil {
			b.Fatal(err)
		}
	}
}
