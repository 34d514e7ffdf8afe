package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"

	"nbd/nixproto"
	"nbd/nixproto/nar"
	"nbd/store"
)

// Paths come in through a store.Upload, which takes one burst of them: an
// operation's paths become valid together, after one sync. NARs are read
// straight from the connection's buffer. Paths go out straight from the blob in
// large writes; once the first byte has been sent, an error can only be shown
// by closing the connection.

// transferBuffer is how much is read from a blob at once.
const transferBuffer = 512 << 10

var transferBuffers = sync.Pool{New: func() any { return new([transferBuffer]byte) }}

// copyBlob writes a whole NAR to w.
func copyBlob(ctx context.Context, w io.Writer, blob *store.Blob) error {
	size := blob.Size()
	var buf []byte
	if size < transferBuffer/8 {
		buf = make([]byte, size)
	} else {
		large := transferBuffers.Get().(*[transferBuffer]byte)
		defer transferBuffers.Put(large)
		buf = large[:]
	}
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), size-off)]
		if n, err := blob.ReadAt(p, off); n < len(p) {
			return fmt.Errorf("read blob: %w", errors.Join(err, store.ErrDamaged))
		}
		if _, err := w.Write(p); err != nil {
			return fmt.Errorf("write NAR: %w: %w", errGone, err)
		}
		off += int64(len(p))
	}
	return nil
}

// closeBlob closes a blob that was only read.
func closeBlob(s *Session, b *store.Blob) {
	if err := b.Close(); err != nil {
		s.Log.Warn("cannot close blob", "err", err)
	}
}

// openPath opens the content of a path that the session may use.
func (ss *session) openPath(p nixproto.StorePath) (*nixproto.PathInfo, *store.Blob, error) {
	info, err := ss.info(p)
	if err != nil {
		return nil, nil, err
	}
	blob, err := ss.server.store.OpenBlob(ss.ctx, info.NarHash)
	if errors.Is(err, store.ErrNotFound) {
		// It went between the two: deleted from the view, then swept.
		return nil, nil, notValid(p)
	}
	return info, blob, err
}

// narFromPath answers with a path's NAR. It reports false if the connection is
// out of step.
func (w *worker) narFromPath(q *nixproto.NarFromPath) bool {
	err := w.Client.require(StoreRead)
	var blob *store.Blob
	if err == nil {
		_, blob, err = w.openPath(q.Path)
	}
	if err != nil {
		w.fail(q.Op().String(), err)
		return true
	}
	defer closeBlob(w.Session, blob)
	err = w.out.stream(func(out io.Writer) error { return copyBlob(w.ctx, out, blob) })
	if err != nil {
		_, level := explain(w.Session, err)
		w.Log.Log(w.ctx, level, "path not sent", "path", q.Path, "err", err)
	}
	return err == nil
}

// mayUpload reports why the client may not bring paths at all. Without
// store:write it may bring what proves itself, as a build needs it.
func (c *Client) mayUpload() error {
	if c.Can(BuildWrite) {
		return nil
	}
	return c.require(StoreWrite)
}

// newUpload begins a burst of paths from the client.
func (ss *session) newUpload(repair bool) (*store.Upload, error) {
	if err := ss.Client.mayUpload(); err != nil {
		return nil, err
	}
	if err := ss.checkStorage(ss.ctx, 0); err != nil {
		return nil, err
	}
	return ss.Sight.NewUpload(ss.ctx, store.UploadOptions{
		Repair: repair && ss.Client.Can(StoreWrite),
		Verify: ss.checkUpload,
	})
}

// checkSignatures refuses signatures in the name of a key that is known here
// and did not make them, and drops what is no signature.
func (ss *session) checkSignatures(info *nixproto.PathInfo) error {
	var good []string
	for _, sig := range info.Signatures {
		if _, _, err := nixproto.ParseSignature(sig); err == nil {
			good = append(good, sig)
		}
	}
	info.Signatures = good
	if len(good) == 0 {
		return nil
	}
	if _, err := info.CheckSignatures(ss.trustedKeys()); err != nil {
		return refusef("%v", err)
	}
	return nil
}

// addTo reads the NAR of info from r into an upload.
func (ss *session) addTo(up *store.Upload, info *nixproto.PathInfo, r io.Reader) error {
	if info.CA == "" && !ss.Client.Can(StoreWrite) {
		return refusef("permission denied: %s does not have %s, so it can only bring content-addressed paths, and '%s' is none",
			ss.Client.who(), StoreWrite, info.Path)
	}
	info.Ultimate = false // it was not built here
	ss.Keep(info.Path)
	err := up.Add(info, r)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return &shortUpload{info.Path}
	}
	return err
}

// A shortUpload is a stream that ended inside a path: the client gave up, said
// a wrong size, or is gone.
type shortUpload struct{ path nixproto.StorePath }

func (e *shortUpload) Error() string {
	return fmt.Sprintf("the upload of '%s' ended before it was complete", e.path)
}

func (e *shortUpload) Unwrap() error { return io.ErrUnexpectedEOF }

// maxBurst is how many paths become valid at once: what is known of each is in
// memory until then.
const maxBurst = 16 << 10

// addMultipleToStore takes the paths of one burst. If the connection breaks, the
// paths that arrived whole are kept: the client will not have to bring them
// again.
func (w *worker) addMultipleToStore(q *nixproto.AddMultipleToStore, stream *nixproto.FramedReader) error {
	n := stream.Uint64()
	for {
		part := min(n, maxBurst)
		if err := w.addBurst(q, stream, part, part == n); err != nil {
			return err
		}
		if n -= part; n == 0 {
			return nil
		}
	}
}

// addBurst takes the next n paths, and the end of the stream after the last.
func (w *worker) addBurst(q *nixproto.AddMultipleToStore, stream *nixproto.FramedReader, n uint64, last bool) error {
	up, err := w.newUpload(q.Repair)
	if err != nil {
		return err
	}
	defer up.Abort()
	err = w.addEach(up, stream, n)
	if err == nil && last {
		err = stream.Finish()
	}
	if err != nil {
		if w.r.Err() != nil {
			err = errors.Join(err, up.Commit())
		}
		return err
	}
	return up.Commit()
}

// addEach reads n paths of a burst.
func (w *worker) addEach(up *store.Upload, stream *nixproto.FramedReader, n uint64) error {
	for range n {
		info, err := nixproto.ReadPathInfo(&stream.Reader)
		if err != nil {
			return err
		}
		if err := w.addTo(up, info, stream); err != nil {
			return err
		}
	}
	return stream.Err()
}

func (w *worker) addToStoreNar(q *nixproto.AddToStoreNar, stream *nixproto.FramedReader) error {
	up, err := w.newUpload(q.Repair)
	if err != nil {
		return err
	}
	defer up.Abort()
	if err := w.addTo(up, &q.Info, stream); err != nil {
		return err
	}
	if err := stream.Finish(); err != nil {
		return err
	}
	return up.Commit()
}

// addToStore takes an object whose path follows from its content.
func (w *worker) addToStore(q *nixproto.AddToStore, stream *nixproto.FramedReader) (nixproto.Response, error) {
	if err := w.Client.mayUpload(); err != nil {
		return nil, err
	}
	method, algo, err := nixproto.ParseCAMethod(q.Method)
	if err != nil {
		return nil, refusef("cannot add %q: %v", q.Name, err)
	}
	if method == nixproto.CAGit {
		return nil, refusef("cannot add %q: git hashing is not supported by this server", q.Name)
	}
	staged, err := w.server.store.Stage(w.ctx, w.Client.Account.ID)
	if err != nil {
		return nil, err
	}
	defer staged.Discard()
	h := nixproto.NewHasher(algo)
	if method == nixproto.CANAR {
		_, err = io.Copy(io.MultiWriter(staged, h), stream)
	} else {
		err = w.stageFile(staged, h, stream)
	}
	if err = errors.Join(err, stream.Err()); err != nil {
		return nil, err
	}
	if err := staged.Finish(); err != nil {
		return nil, err
	}
	ca := nixproto.ContentAddress{Method: method, Hash: nixproto.HashFromSum(algo, h)}
	info, err := w.register(staged, ca, q)
	if err != nil {
		return nil, err
	}
	return &nixproto.ValidPathInfo{Info: *info}, nil
}

// register makes a content-addressed object valid.
func (w *worker) register(staged *store.Staged, ca nixproto.ContentAddress, q *nixproto.AddToStore) (*nixproto.PathInfo, error) {
	path, err := ca.Path(q.Name, q.References, false)
	if err != nil {
		return nil, refusef("cannot add %q: %v", q.Name, err)
	}
	w.Keep(path)
	info := nixproto.PathInfo{Path: path, References: q.References, CA: ca.String()}
	err = w.Sight.Register(w.ctx, []store.Registration{{Info: info, Staged: staged}})
	if err != nil {
		return nil, err
	}
	return w.info(path)
}

// maxInMemory is the largest flat file that is taken without a temporary file.
const maxInMemory = 1 << 20

// stageFile stages a plain file. Its NAR begins with its size, which is known
// only when all of it has arrived.
func (w *worker) stageFile(staged *store.Staged, h hash.Hash, r io.Reader) error {
	var head bytes.Buffer
	n, err := io.CopyN(&head, r, maxInMemory)
	if err == io.EOF {
		return writeFile(staged, h, &head, n)
	}
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(w.server.cfg.TempDir, "nbd-upload-")
	if err != nil {
		return fmt.Errorf("spool file: %w", err)
	}
	defer f.Close() // nothing in it is needed again
	if err := os.Remove(f.Name()); err != nil {
		return fmt.Errorf("spool file: %w", err)
	}
	rest, err := io.Copy(&spool{to: f, room: w.server.store.CheckRoom}, r)
	if err != nil {
		return fmt.Errorf("spool file: %w", err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("spool file: %w", err)
	}
	return writeFile(staged, h, io.MultiReader(&head, f), n+rest)
}

// A spool is a temporary file that leaves as much of the disk free as uploads
// do.
type spool struct {
	to   io.Writer
	room func(int64) error
	left int64 // bytes until the next look at what is free
}

// spoolStride is how much of a spool is written between looks at what is free.
const spoolStride = 8 << 20

// Write implements io.Writer.
func (s *spool) Write(p []byte) (int, error) {
	if s.left -= int64(len(p)); s.left < 0 {
		if err := s.room(spoolStride); err != nil {
			return 0, err
		}
		s.left = spoolStride
	}
	return s.to.Write(p)
}

// writeFile writes the NAR of a plain file with those contents, which go to h
// too.
func writeFile(w io.Writer, h hash.Hash, contents io.Reader, size int64) error {
	nw := nar.NewWriter(w)
	if err := nw.File("", false, size); err != nil {
		return err
	}
	if _, err := io.Copy(io.MultiWriter(nw, h), contents); err != nil {
		return err
	}
	return nw.Close()
}

// addSignatures adds signatures to a path of the account's own view, after what
// can be verified of them was.
func (w *worker) addSignatures(q *nixproto.AddSignatures) error {
	info, err := w.server.store.Info(w.ctx, w.Client.Account.ID, q.Path)
	if err != nil {
		return aboutPath(q.Path, err)
	}
	for _, sig := range q.Signatures {
		if _, _, err := nixproto.ParseSignature(sig); err != nil {
			return refusef("%v", err)
		}
	}
	signed := *info
	signed.Signatures = q.Signatures
	if _, err := signed.CheckSignatures(w.trustedKeys()); err != nil {
		return refusef("%v", err)
	}
	err = w.server.store.AddSignatures(w.ctx, w.Client.Account.ID, q.Path, q.Signatures)
	return aboutPath(q.Path, err)
}
