package nixproto

// An export stream (nix-store --export, serve commands ImportPaths and
// ExportPaths) is for each path: the number 1, its NAR, and what is known of
// it; at the end the number 0.

const exportMagic = 0x4558494e

// ReadExportNext reports whether another path follows in an export stream: its
// NAR comes next, then ReadExportInfo.
func ReadExportNext(r *Reader) (bool, error) {
	r.begin()
	n := r.u64()
	if n > 1 {
		r.malformed("an export stream with the mark %d", n)
	}
	return n == 1, readError(r, named("export stream"))
}

// ReadExportInfo reads what follows a NAR in an export stream. NarHash and
// NarSize are not in it, and an old kind of signature that may be is dropped.
// The errors are ReadRequest's.
func ReadExportInfo(r *Reader) (*PathInfo, error) {
	r.begin()
	p := new(PathInfo)
	p.exportFields(codec{r: r})
	return p, readError(r, named("export stream"))
}

// WriteExportNext announces a path of an export stream. The caller writes its
// NAR, then WriteExportInfo.
func WriteExportNext(w *Writer) error {
	w.Uint64(1)
	return w.Err()
}

// WriteExportInfo writes what follows a NAR in an export stream.
func WriteExportInfo(w *Writer, p *PathInfo) error {
	p.exportFields(codec{w: w})
	return w.Err()
}

// WriteExportEnd ends an export stream, without flushing.
func WriteExportEnd(w *Writer) error {
	w.Uint64(0)
	return w.Err()
}

func (p *PathInfo) exportFields(c codec) {
	c.constant(exportMagic, "the mark behind a NAR in an export stream")
	c.path(&p.Path)
	c.paths(&p.References)
	c.optPath(&p.Deriver)
	signed := false
	c.bool(&signed)
	if signed {
		var signature string
		c.str(&signature, maxSmall)
	}
}
