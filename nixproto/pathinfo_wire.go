package nixproto

import "fmt"

// ReadPathInfo reads a path with what is known of it, as an entry of
// AddMultipleToStore has it: always in the layout of worker version 1.16. The
// errors are ReadRequest's.
func ReadPathInfo(r *Reader) (*PathInfo, error) {
	r.begin()
	p := new(PathInfo)
	p.fields(codec{r: r})
	return p, readError(r, named("path info"))
}

// WritePathInfo writes what ReadPathInfo reads, without flushing.
func WritePathInfo(w *Writer, p *PathInfo) error {
	p.fields(codec{w: w})
	return w.Err()
}

// named gives readError the name of what is no operation.
type named string

func (n named) String() string { return string(n) }

// fields is ValidPathInfo in the specification, the same in all versions from
// worker 1.16 and in the serve protocol's AddToStoreNar.
func (p *PathInfo) fields(c codec) {
	c.path(&p.Path)
	p.unkeyed(c)
}

// unkeyed is UnkeyedValidPathInfo.
func (p *PathInfo) unkeyed(c codec) {
	c.optPath(&p.Deriver)
	if c.reading() {
		p.NarHash = c.r.narHash()
	} else {
		c.w.Str(p.NarHash.Base16())
	}
	c.paths(&p.References)
	c.i64(&p.RegistrationTime)
	c.u64(&p.NarSize)
	c.bool(&p.Ultimate)
	c.stringSet(&p.Signatures)
	c.str(&p.CA, maxSmall)
}

// serveFields is the serve protocol's answer to QueryPathInfos for one path.
func (p *PathInfo) serveFields(c codec) {
	c.optPath(&p.Deriver)
	c.paths(&p.References)
	c.unused(p.NarSize) // the download size; nothing is compressed on this way
	c.u64(&p.NarSize)
	if c.reading() {
		p.NarHash = c.r.narHash()
	} else {
		c.w.Str(p.NarHash.String())
	}
	c.str(&p.CA, maxSmall)
	c.stringSet(&p.Signatures)
}

// narHash reads the SHA-256 of a NAR in any spelling.
func (r *Reader) narHash() Hash {
	h, err := ParseHash(SHA256, r.str(maxSmall))
	if err != nil {
		r.reject(fmt.Errorf("hash of a NAR: %w", err))
	}
	return h
}
