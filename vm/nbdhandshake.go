package vm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// Numbers of the handshake.
const (
	nbdMagic      = 0x4e42444d41474943 // "NBDMAGIC"
	nbdOptMagic   = 0x49484156454f5054 // "IHAVEOPT"
	nbdReplyMagic = 0x0003e889045565a9

	nbdFlagFixedNewstyle = 1 << 0
	nbdFlagNoZeroes      = 1 << 1

	nbdOptExportName = 1
	nbdOptAbort      = 2
	nbdOptList       = 3
	nbdOptInfo       = 6
	nbdOptGo         = 7

	nbdRepAck        = 1
	nbdRepServer     = 2
	nbdRepInfo       = 3
	nbdRepErr        = 1 << 31
	nbdRepErrUnsup   = nbdRepErr + 1
	nbdRepErrInvalid = nbdRepErr + 3
	nbdRepErrUnknown = nbdRepErr + 6
	nbdRepErrTooBig  = nbdRepErr + 9

	nbdInfoExport    = 0
	nbdInfoBlockSize = 3

	nbdTransHasFlags    = 1 << 0
	nbdTransReadOnly    = 1 << 1
	nbdTransFlush       = 1 << 2
	nbdTransFUA         = 1 << 3
	nbdTransTrim        = 1 << 5
	nbdTransWriteZeroes = 1 << 6
	nbdTransMultiConn   = 1 << 8
)

// Bounds of the handshake.
const (
	nbdMaxOption      = 8 << 10 // bytes of an option's data
	nbdMaxOptions     = 64
	nbdHandshakeLimit = 30 * time.Second
)

// errNBDEnd ends a connection whose client said goodbye.
var errNBDEnd = errors.New("client left")

// handshake negotiates up to the transmission phase.
func (c *nbdConn) handshake() error {
	if err := c.conn.SetDeadline(time.Now().Add(nbdHandshakeLimit)); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	hello := binary.BigEndian.AppendUint64(nil, nbdMagic)
	hello = binary.BigEndian.AppendUint64(hello, nbdOptMagic)
	hello = binary.BigEndian.AppendUint16(hello, nbdFlagFixedNewstyle|nbdFlagNoZeroes)
	if _, err := c.conn.Write(hello); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	var flags [4]byte
	if _, err := io.ReadFull(c.r, flags[:]); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	f := binary.BigEndian.Uint32(flags[:])
	if f&^(nbdFlagFixedNewstyle|nbdFlagNoZeroes) != 0 {
		return fmt.Errorf("handshake: unknown client flags %#x", f)
	}
	for range nbdMaxOptions {
		done, err := c.option(f&nbdFlagNoZeroes != 0)
		if err != nil {
			return fmt.Errorf("handshake: %w", err)
		}
		if done {
			return c.conn.SetDeadline(time.Time{})
		}
	}
	return errors.New("handshake: too many options")
}

// option answers one option; done if the transmission phase begins.
func (c *nbdConn) option(noZeroes bool) (done bool, err error) {
	var head [16]byte
	if _, err := io.ReadFull(c.r, head[:]); err != nil {
		return false, err
	}
	be := binary.BigEndian
	if be.Uint64(head[:]) != nbdOptMagic {
		return false, errors.New("bad magic of an option")
	}
	opt, n := be.Uint32(head[8:]), be.Uint32(head[12:])
	if n > nbdMaxOption {
		// The client may be told, but what it sent is not worth the reading.
		return false, errors.Join(fmt.Errorf("option %d of %d bytes", opt, n), c.optReply(opt, nbdRepErrTooBig, nil))
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(c.r, data); err != nil {
		return false, err
	}
	switch opt {
	case nbdOptExportName:
		return c.exportName(data, noZeroes)
	case nbdOptAbort:
		// A client may close without waiting for the answer.
		_ = c.optReply(opt, nbdRepAck, nil)
		return false, errNBDEnd
	case nbdOptList:
		return false, c.list(data)
	case nbdOptInfo, nbdOptGo:
		ok, err := c.info(opt, data)
		return ok && opt == nbdOptGo, err
	}
	return false, c.optReply(opt, nbdRepErrUnsup, nil)
}

// optReply sends one reply to an option.
func (c *nbdConn) optReply(opt, kind uint32, data []byte) error {
	be := binary.BigEndian
	b := be.AppendUint64(nil, nbdReplyMagic)
	b = be.AppendUint32(b, opt)
	b = be.AppendUint32(b, kind)
	b = be.AppendUint32(b, uint32(len(data)))
	_, err := c.conn.Write(append(b, data...))
	return err
}

// exportName answers the option of old clients, which cannot be refused but by
// closing.
func (c *nbdConn) exportName(name []byte, noZeroes bool) (done bool, err error) {
	if len(name) != 0 {
		return false, fmt.Errorf("unknown export %.80q", name)
	}
	b := binary.BigEndian.AppendUint64(nil, DiskSize)
	b = binary.BigEndian.AppendUint16(b, c.flags())
	if !noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	_, err = c.conn.Write(b)
	return true, err
}

// list tells of the one export, whose name is empty.
func (c *nbdConn) list(data []byte) error {
	if len(data) != 0 {
		return c.optReply(nbdOptList, nbdRepErrInvalid, nil)
	}
	if err := c.optReply(nbdOptList, nbdRepServer, make([]byte, 4)); err != nil {
		return err
	}
	return c.optReply(nbdOptList, nbdRepAck, nil)
}

// info answers NBD_OPT_INFO and NBD_OPT_GO; ok if it was not with an error.
func (c *nbdConn) info(opt uint32, data []byte) (ok bool, err error) {
	be := binary.BigEndian
	if len(data) < 6 {
		return false, c.optReply(opt, nbdRepErrInvalid, nil)
	}
	n := be.Uint32(data)
	rest := data[4:]
	if uint64(n)+2 > uint64(len(rest)) || int(n)+2+2*int(be.Uint16(rest[n:])) != len(rest) {
		return false, c.optReply(opt, nbdRepErrInvalid, nil)
	}
	if n != 0 {
		return false, c.optReply(opt, nbdRepErrUnknown, nil)
	}
	b := be.AppendUint16(nil, nbdInfoExport)
	b = be.AppendUint64(b, DiskSize)
	b = be.AppendUint16(b, c.flags())
	if err := c.optReply(opt, nbdRepInfo, b); err != nil {
		return false, err
	}
	for wanted := rest[2:]; len(wanted) > 0; wanted = wanted[2:] {
		if be.Uint16(wanted) != nbdInfoBlockSize {
			continue // the answer to what we do not know is silence
		}
		b := be.AppendUint16(nil, nbdInfoBlockSize)
		b = be.AppendUint32(b, 1) // no least size: a larger one makes clients read before they write
		b = be.AppendUint32(b, 4096)
		b = be.AppendUint32(b, nbdMaxRequest)
		if err := c.optReply(opt, nbdRepInfo, b); err != nil {
			return false, err
		}
		break
	}
	return true, c.optReply(opt, nbdRepAck, nil)
}

// flags returns the transmission flags.
func (c *nbdConn) flags() uint16 {
	if c.disk.writable() {
		return nbdTransHasFlags | nbdTransFlush | nbdTransFUA | nbdTransTrim | nbdTransWriteZeroes
	}
	return nbdTransHasFlags | nbdTransReadOnly | nbdTransMultiConn
}
