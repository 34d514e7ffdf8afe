package server

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
	"nbd/vm"
)

// BenchmarkReusedAnswer is one request for a build that is known, over one warm
// connection, with many builds stored: one whose outputs are valid already, and
// one that enters the account's view because of an equal key, which writes to
// disk. Both should be flat.
func BenchmarkReusedAnswer(b *testing.B) {
	for _, stored := range []int{10_000, 1_000_000} {
		b.Run(fmt.Sprint(stored), func(b *testing.B) { benchReused(b, stored) })
	}
}

func benchReused(b *testing.B, stored int) {
	var builds *Builds
	ts := newTestServer(b, func(c *Config) {
		var err error
		builds, err = NewBuilds(b.Context(), BuildsConfig{Store: c.Store, Runner: &fakeRunner{status: vm.Status{Accel: "kvm"}}})
		if err != nil {
			b.Fatal(err)
		}
		c.Builder = builds
	})
	b.Cleanup(builds.Close)
	holder := ts.addAccount("holder", newKey(b), nil)
	content := builtPath(b, "content", "what was built")
	ts.upload(holder.ID, content)
	fillBuilds(b, ts.store, holder.ID, content, stored)
	w := ts.worker(ts.alice)
	n := 0
	for _, name := range []string{"valid", "granted"} {
		b.Run(name, func(b *testing.B) {
			var reqs []*nixproto.BuildDerivation
			for range b.N {
				if name == "granted" || len(reqs) == 0 {
					n++
					reqs = append(reqs, knownBuild(b, ts.store, holder.ID, content, n))
				}
			}
			if name == "valid" {
				benchBuild(b, w, reqs[0])
			}
			times := make([]time.Duration, 0, b.N)
			b.ResetTimer()
			for i := range b.N {
				start := time.Now()
				benchBuild(b, w, reqs[i%len(reqs)])
				times = append(times, time.Since(start))
			}
			slices.Sort(times)
			b.ReportMetric(float64(times[len(times)/2].Microseconds()), "µs-median")
			b.ReportMetric(float64(len(times))/b.Elapsed().Seconds(), "answers/s")
		})
	}
}

func benchBuild(b *testing.B, w *workerClient, req *nixproto.BuildDerivation) {
	b.Helper()
	resp, err := w.Do(req, nil)
	if err != nil {
		b.Fatal(err)
	}
	if r := resp.(*nixproto.BuildResult); !r.Status.Success() {
		b.Fatalf("status %d: %s", r.Status, r.Error)
	}
}

// knownBuild stores that a build succeeded, and returns the request for it.
func knownBuild(b *testing.B, st *store.Store, holder store.AccountID, content testPath, n int) *nixproto.BuildDerivation {
	b.Helper()
	d := drv("known")
	d.Env["n"] = fmt.Sprint(n)
	paths, _, err := nixproto.NewModulo(nil).OutputPaths(d)
	if err != nil {
		b.Fatal(err)
	}
	d.Outputs["out"] = nixproto.DerivationOutput{Path: paths["out"]}
	d.Env["out"] = string(paths["out"])
	path, err := d.DrvPath()
	if err != nil {
		b.Fatal(err)
	}
	key, err := reuse.KeyOfRoots(d, nil)
	if err != nil {
		b.Fatal(err)
	}
	err = st.EndBuild(b.Context(), nil, store.End{Key: key, Shared: true, Success: &store.Result{Build: 1, Account: holder, Time: time.Now(),
		Outputs: map[string]store.ResultOutput{"out": {Path: paths["out"], NarHash: content.NarHash, NarSize: content.NarSize}}}})
	if err != nil {
		b.Fatal(err)
	}
	return &nixproto.BuildDerivation{DrvPath: path, Derivation: d}
}

// fillBuilds stores n builds with their ends.
func fillBuilds(b *testing.B, st *store.Store, a store.AccountID, content testPath, n int) {
	b.Helper()
	const batch = 20_000
	for done := 0; done < n; done += batch {
		var builds []*store.Build
		var ends []store.End
		for i := done; i < min(n, done+batch); i++ {
			id, err := st.ReserveBuild(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			var key [32]byte
			binary.BigEndian.PutUint64(key[:], uint64(i)*(math.MaxUint64/uint64(n)))
			copy(key[8:], bytes.Repeat([]byte{byte(i)}, 24))
			out := store.ResultOutput{Path: content.Path, NarHash: content.NarHash, NarSize: content.NarSize}
			builds = append(builds, &store.Build{ID: id, Account: a, DrvPath: content.Path, Name: "x", System: "x86_64-linux", Status: store.StatusBuilt,
				Created: time.Unix(int64(i), 0), Started: time.Unix(int64(i), 0), Stopped: time.Unix(int64(i+1), 0), CPUs: 2, CPUSeconds: 2,
				Outputs:   []store.BuildOutput{{Name: "out", Path: out.Path, NarHash: out.NarHash, NarSize: out.NarSize}},
				Decisions: []store.Decision{{Check: "outputs", Reason: "not all outputs are valid"}, {Check: "run", Taken: true, Reason: "nothing stands in for a run"}}})
			ends = append(ends, store.End{Key: key, Shared: true, Success: &store.Result{Build: id, Account: a, Time: time.Unix(int64(i), 0), Outputs: map[string]store.ResultOutput{"out": out}}})
		}
		if err := st.EndBuild(b.Context(), builds, ends...); err != nil {
			b.Fatal(err)
		}
	}
}
