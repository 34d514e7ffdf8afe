package store_test

import (
	"bytes"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
)

// cpu returns the CPU time that the process has used.
func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// reportCPU reports CPU time in milliseconds for each of n units of an
// iteration, from when it is called until the function returned is.
func reportCPU(b *testing.B, n int, unit string) func() {
	start := cpu()
	return func() {
		b.ReportMetric(float64(cpu()-start)/float64(time.Millisecond)/float64(b.N)/float64(n), "cpu-ms/"+unit)
	}
}

// chain returns n small paths, each of which refers to three others.
func chain(n, round int) (infos []*nixproto.PathInfo, nars [][]byte) {
	for i := range n {
		nar := storetest.File(fmt.Sprintf("file %d of round %d\n%2000d", i, round, i), false)
		var refs []nixproto.StorePath
		for back := 1; back <= 3 && back <= i; back++ {
			refs = append(refs, infos[i-back].Path)
		}
		infos = append(infos, storetest.Source(fmt.Sprintf("small-%d", i), nar, refs...))
		nars = append(nars, nar)
	}
	return infos, nars
}

// BenchmarkBurst uploads 2,000 small paths in one burst to an empty view, and
// has them in the database.
func BenchmarkBurst(b *testing.B) {
	s := storetest.OpenDir(b, b.TempDir(), store.Config{})
	const n = 2000
	var total time.Duration
	for i := range b.N {
		b.StopTimer()
		a := storetest.Account(b, s, fmt.Sprintf("alice-%d", i))
		infos, nars := chain(n, i)
		runtime.GC()
		b.StartTimer()
		start := cpu()
		u, err := s.NewUpload(ctx, a, store.UploadOptions{})
		if err != nil {
			b.Fatal(err)
		}
		for i := range infos {
			if err := u.Add(infos[i], bytes.NewReader(nars[i])); err != nil {
				b.Fatal(err)
			}
		}
		if err := u.Commit(); err != nil {
			b.Fatal(err)
		}
		if _, err := s.ByHashPart(ctx, a, infos[0].Path.HashPart()); err != nil { // flushes
			b.Fatal(err)
		}
		total += cpu() - start
	}
	b.ReportMetric(float64(total)/float64(time.Millisecond)/float64(b.N), "cpu-ms/burst")
}

// BenchmarkOneByOne uploads small paths, each with a commit of its own, as the
// serve protocol does.
func BenchmarkOneByOne(b *testing.B) {
	s := storetest.OpenDir(b, b.TempDir(), store.Config{})
	a := storetest.Account(b, s, "alice")
	infos, nars := chain(b.N, 0)
	b.ResetTimer()
	defer reportCPU(b, 1, "path")()
	for i := range infos {
		storetest.Add(b, s, a, infos[i], nars[i])
	}
}

// BenchmarkCommitOne is what a transaction of the database for each path would
// cost, without its content.
func BenchmarkCommitOne(b *testing.B) {
	db, err := bolt.Open(filepath.Join(b.TempDir(), "db"), 0o600, &bolt.Options{NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	infos, _ := chain(b.N, 0)
	b.ResetTimer()
	defer reportCPU(b, 1, "path")()
	for _, info := range infos {
		err := db.Update(func(tx *bolt.Tx) error {
			for _, name := range []string{"paths", "blobs", "referrers"} {
				bucket, err := tx.CreateBucketIfNotExists([]byte(name))
				if err != nil {
					return err
				}
				if err := bucket.Put([]byte(info.Path), make([]byte, 200)); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
}

// A narStream is a NAR of one large file made of the same bytes, as a
// nixproto.Source, so that the benchmark measures nothing but the store.
type narStream struct {
	head, block, tail []byte
	blocks            int
	at                []byte
	state             int
}

func (n *narStream) Peek() ([]byte, error) {
	for len(n.at) == 0 {
		switch {
		case n.state == 0:
			n.at = n.head
		case n.state <= n.blocks:
			n.at = n.block
		case n.state == n.blocks+1:
			n.at = n.tail
		default:
			return nil, io.EOF
		}
		n.state++
	}
	return n.at, nil
}

func (n *narStream) Discard(k int) { n.at = n.at[k:] }
func (n *narStream) Ready() bool   { return true }

func (n *narStream) Read(p []byte) (int, error) {
	b, err := n.Peek()
	k := copy(p, b)
	n.Discard(k)
	return k, err
}

// BenchmarkLarge uploads a path of 1 GiB.
func BenchmarkLarge(b *testing.B) {
	s := storetest.OpenDir(b, b.TempDir(), store.Config{})
	a := storetest.Account(b, s, "alice")
	const block, blocks = 512 << 10, 2048
	empty := storetest.File("", false)
	var total time.Duration
	for i := range b.N {
		stream := &narStream{head: largeHead(block * blocks), block: bytes.Repeat([]byte{byte(i)}, block), blocks: blocks, tail: empty[len(empty)-16:]}
		h := nixproto.NewHasher(nixproto.SHA256)
		size, err := io.Copy(h, &narStream{head: stream.head, block: stream.block, blocks: blocks, tail: stream.tail})
		if err != nil {
			b.Fatal(err)
		}
		info := storetest.Unsigned(fmt.Sprint(i), "large", nil)
		info.NarHash, info.NarSize = nixproto.HashFromSum(nixproto.SHA256, h), uint64(size)
		b.StartTimer()
		start := cpu()
		u, err := s.NewUpload(ctx, a, store.UploadOptions{})
		if err != nil {
			b.Fatal(err)
		}
		if err := u.Add(info, stream); err != nil {
			b.Fatal(err)
		}
		if err := u.Commit(); err != nil {
			b.Fatal(err)
		}
		total += cpu() - start
		b.StopTimer()
		if _, err := s.Delete(ctx, a, info.Path); err != nil {
			b.Fatal(err)
		}
		if _, err := s.Sweep(ctx); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(total)/float64(time.Millisecond)/float64(b.N)/1024, "cpu-ms/MiB")
}

// largeHead returns the beginning of the NAR of a file of n bytes, which is a
// multiple of 8.
func largeHead(n int) []byte {
	empty := storetest.File("", false)
	head := bytes.Clone(empty[:len(empty)-24])
	return append(head, byte(n), byte(n>>8), byte(n>>16), byte(n>>24), byte(n>>32), 0, 0, 0)
}

// BenchmarkLookup asks for paths of a view of 20,000.
func BenchmarkLookup(b *testing.B) {
	s := storetest.OpenDir(b, b.TempDir(), store.Config{})
	a := storetest.Account(b, s, "alice")
	infos := storetest.Fill(b, s, a, 20000)
	if _, err := s.All(ctx, a); err != nil { // flushes
		b.Fatal(err)
	}
	b.Run("Info", func(b *testing.B) {
		for i := range b.N {
			if _, err := s.Info(ctx, a, infos[i*7919%len(infos)].Path); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Valid1000", func(b *testing.B) {
		paths := make([]nixproto.StorePath, 1000)
		for i := range paths {
			paths[i] = infos[i*7919%len(infos)].Path
		}
		for range b.N {
			if v, err := s.Valid(ctx, a, paths); err != nil || len(v) != len(paths) {
				b.Fatal(len(v), err)
			}
		}
	})
	b.Run("Closure5000", func(b *testing.B) {
		for range b.N {
			if _, err := s.ClosureInfo(ctx, a, []nixproto.StorePath{infos[4999].Path}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Referrers20000", func(b *testing.B) {
		for i := range b.N {
			if _, err := s.Referrers(ctx, a, infos[i*7919%len(infos)].Path); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("OpenBlob", func(b *testing.B) {
		for i := range b.N {
			blob, err := s.OpenBlob(ctx, infos[i*7919%len(infos)].NarHash)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := blob.Index(); err != nil {
				b.Fatal(err)
			}
			if err := blob.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkSight asks a view of 20,000 paths, with and without lenders, for
// paths that it has, that the last lender has, and that nobody has.
func BenchmarkSight(b *testing.B) {
	s := storetest.OpenDir(b, b.TempDir(), store.Config{})
	own := storetest.Account(b, s, "own")
	infos := storetest.Fill(b, s, own, 20000)
	var lenders []store.AccountID
	var lent []nixproto.PathInfo
	for i := range 10 {
		a := storetest.Account(b, s, fmt.Sprint("lender-", i))
		lent = storetest.Fill(b, s, a, 2000)
		lenders = append(lenders, a)
	}
	if _, err := s.All(ctx, own); err != nil { // flushes
		b.Fatal(err)
	}
	for _, n := range []int{0, 10} {
		v := s.NewSight(own, store.Trust{Linked: lenders[:n]})
		lease := v.NewLease()
		defer lease.Release()
		ask := func(name string, path func(i int) nixproto.StorePath, there bool) {
			b.Run(fmt.Sprintf("lenders=%d/%s", n, name), func(b *testing.B) {
				for i := range b.N {
					if valid, err := v.Valid(ctx, []nixproto.StorePath{path(i)}); err != nil || len(valid) == 1 != there {
						b.Fatal(valid, err)
					}
				}
			})
		}
		ask("own", func(i int) nixproto.StorePath { return infos[i*7919%len(infos)].Path }, true)
		ask("absent", func(i int) nixproto.StorePath {
			return storetest.Unsigned(fmt.Sprint("absent-", i%1000), "x", nil).Path
		}, false)
		ask("lent", func(i int) nixproto.StorePath { return lent[i*7919%len(lent)].Path }, n > 0)
	}
}

// BenchmarkInputRoots makes what a reuse key needs of a closure of 5,000 paths,
// of which one is named, or all, and for comparison of records whose closure
// hashes are not known.
func BenchmarkInputRoots(b *testing.B) {
	s := storetest.OpenDir(b, b.TempDir(), store.Config{})
	a, other := storetest.Account(b, s, "alice"), storetest.Account(b, s, "bob")
	infos := storetest.Fill(b, s, a, 5000)
	all := make([]nixproto.StorePath, len(infos))
	for i := range infos {
		all[i] = infos[i].Path
	}
	if _, err := s.All(ctx, a); err != nil { // flushes
		b.Fatal(err)
	}
	run := func(name string, v *store.Sight, inputs []nixproto.StorePath) {
		lease := v.NewLease()
		defer lease.Release()
		b.Run(name, func(b *testing.B) {
			for range b.N {
				if roots, _, err := v.InputRoots(ctx, inputs); err != nil || len(roots) == 0 {
					b.Fatal(roots, err)
				}
			}
		})
	}
	alice := s.NewSight(a, store.Trust{})
	run("one", alice, all[len(all)-1:])
	run("all", alice, all)
	run("lent", s.NewSight(other, store.Trust{Linked: []store.AccountID{a}}), all[len(all)-1:])
}
